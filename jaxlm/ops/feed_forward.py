"""Non-linearities of the feed-forward."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    # By erf: jax.nn.gelu goes by erfc, which costs XLA:CPU twice as much.
    "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    # So et al. 2021, arXiv:2109.08668.
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def activate(
    pre: Float[Array, "*B F"],
    up: Float[Array, "*B F"] | None,
    activation: str,
) -> Float[Array, "*B F"]:
    """`act(pre)`, times `up` when gated (Shazeer 2020, arXiv:2002.05202).

    Computed in f32, also backward, from nothing saved but the arguments.

    Args:
      pre: the projection that the non-linearity acts on (the gate, when gated).
      up: the second projection of SwiGLU, GeGLU and their like; None without a gate.
      activation: a name in `ACTIVATIONS`.
    """
    hidden = ACTIVATIONS[activation](pre.astype(jnp.float32))
    if up is not None:
        hidden = hidden * up.astype(jnp.float32)
    # The barrier keeps XLA:CPU from computing it again inside the product that follows.
    return jax.lax.optimization_barrier(hidden.astype(pre.dtype))


def _activate_forward(pre, up, activation):
    return activate(pre, up, activation), (pre, up)


def _activate_backward(activation, residuals, g):
    pre, up = residuals
    g32 = g.astype(jnp.float32)
    hidden, pull = jax.vjp(ACTIVATIONS[activation], pre.astype(jnp.float32))
    if up is None:
        return pull(g32)[0].astype(pre.dtype), None
    (dpre,) = pull(g32 * up.astype(jnp.float32))
    return dpre.astype(pre.dtype), (g32 * hidden).astype(up.dtype)


activate.defvjp(_activate_forward, _activate_backward)
