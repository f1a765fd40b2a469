"""Normalisation over the last axis. All arithmetic in f32, results in x's dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def inverse_rms(x: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B 1"]:
    """`1 / sqrt(mean(x^2) + epsilon)` in f32."""
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jax.lax.rsqrt(mean_square + epsilon)


def inverse_std(x: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B 1"]:
    """`1 / sqrt(variance(x) + epsilon)` in f32."""
    x32 = x.astype(jnp.float32)
    return inverse_rms(x32 - jnp.mean(x32, axis=-1, keepdims=True), epsilon)


def rms_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    inverse: Float[Array, "*B 1"],
    *,
    unit_offset: bool = False,
) -> Float[Array, "*B D"]:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
      x: any float dtype.
      scale: multiplied in f32, before the result is rounded to x's dtype.
      inverse: `inverse_rms(x, epsilon)`.
      unit_offset: multiply by `1 + scale`, as Gemma does.
    """
    factor = scale.astype(jnp.float32) + (1.0 if unit_offset else 0.0)
    return (x.astype(jnp.float32) * inverse * factor).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    inverse: Float[Array, "*B 1"],
) -> Float[Array, "*B D"]:
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450), its bias optional.

    Args:
      inverse: `inverse_std(x, epsilon)`.
    """
    x32 = x.astype(jnp.float32)
    y = (x32 - jnp.mean(x32, axis=-1, keepdims=True)) * inverse
    y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)
