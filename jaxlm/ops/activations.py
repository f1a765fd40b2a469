"""Activation functions of the feed-forward."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# As in gpt-oss.
CLAMP = 7.0


def _clamped_swish(x: Array) -> Array:
    x = jnp.minimum(x, CLAMP)
    return x * jax.nn.sigmoid(1.702 * x)


# CONTRIBUTING.md lists where else a new name is entered.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    # With erf; jax.nn.gelu uses erfc, which takes XLA:CPU twice as long.
    "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    # So et al. 2021, arXiv:2109.08668.
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu_clamped": _clamped_swish,
}

# Applied to `up` before it is multiplied; other activations leave it as it is.
FACTORS: dict[str, Callable[[Array], Array]] = {
    "swiglu_clamped": lambda up: jnp.clip(up, -CLAMP, CLAMP) + 1,
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def activate(
    pre: Float[Array, "*B F"],
    up: Float[Array, "*B F"] | None,
    activation: str,
) -> Float[Array, "*B F"]:
    """`act(pre)`, times `factor(up)` if gated (Shazeer 2020, arXiv:2002.05202).

    Forward and backward are computed in f32. Only the arguments are saved.

    Args:
      pre: the projection that the activation is applied to (the gate, if gated).
      up: the second projection of SwiGLU, GeGLU and similar; None without a gate.
      activation: a name in `ACTIVATIONS`; those in `FACTORS` change `up` too.
    """
    hidden = ACTIVATIONS[activation](pre.astype(jnp.float32))
    if up is not None:
        hidden = hidden * _factor(activation)(up.astype(jnp.float32))
    # The barrier keeps XLA:CPU from recomputing this inside the einsum that follows.
    return jax.lax.optimization_barrier(hidden.astype(pre.dtype))


def _factor(activation: str) -> Callable[[Array], Array]:
    return FACTORS.get(activation, lambda up: up)


def _activate_forward(pre, up, activation):
    return activate(pre, up, activation), (pre, up)


def _activate_backward(activation, residuals, g):
    pre, up = residuals
    g32 = g.astype(jnp.float32)
    hidden, pull = jax.vjp(ACTIVATIONS[activation], pre.astype(jnp.float32))
    if up is None:
        return pull(g32)[0].astype(pre.dtype), None
    factor, pull_up = jax.vjp(_factor(activation), up.astype(jnp.float32))
    (dpre,), (dup,) = pull(g32 * factor), pull_up(g32 * hidden)
    return dpre.astype(pre.dtype), dup.astype(up.dtype)


activate.defvjp(_activate_forward, _activate_backward)
