"""Non-linearities of the feed-forward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable[[Float[Array, "..."]], Float[Array, "..."]]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    # So et al. 2021, arXiv:2109.08668.
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


def activate(
    pre: Float[Array, "*B F"],
    up: Float[Array, "*B F"] | None,
    activation: str,
) -> Float[Array, "*B F"]:
    """`act(pre)`, times `up` when gated (Shazeer 2020, arXiv:2002.05202).

    Args:
      pre: the projection that the non-linearity acts on (the gate, when gated).
      up: the second projection of SwiGLU, GeGLU and their like; None without a gate.
      activation: a name in `ACTIVATIONS`.
    """
    hidden = ACTIVATIONS[activation](pre)
    return hidden if up is None else hidden * up
