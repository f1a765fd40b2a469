"""Normalization over the last axis. All arithmetic in f32, results in x's dtype."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def divisor(x: Float[Array, "*B D"], epsilon: float, kind: str) -> Float[Array, "*B 1"]:
    """Returns what `normalize` divides by, f32: `sqrt(mean(x^2) + epsilon)`.

    For `layer`: `sqrt(variance + epsilon)`.
    """
    return 1.0 / _inverse_rms(_centered_f32(x, kind), epsilon)


def _centered_f32(x: Float[Array, "*B D"], kind: str) -> Float[Array, "*B D"]:
    x32 = x.astype(jnp.float32)
    if kind == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return x32


def _inverse_rms(x32: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B 1"]:
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return jax.lax.rsqrt(mean_square + epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    epsilon: float,
    kind: str,
) -> Float[Array, "*B D"]:
    """RMSNorm or LayerNorm, in x's dtype, with a backward pass of its own.

    Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016,
    arXiv:1607.06450. The only large array saved for the backward pass is the normalized
    x in its own dtype.

    Args:
      x: any float dtype.
      scale, bias: applied in f32, before the result is rounded to x's dtype.
      epsilon: added to the mean square or the variance.
      kind: `rms`, `rms_unit_offset` (multiply by `1 + scale`, as Gemma does) or
        `layer` (the mean is subtracted first).
    """
    return _normalize_forward(x, scale, bias, epsilon, kind)[0]


def _factor(scale, kind: str) -> Float[Array, " D"]:
    return scale.astype(jnp.float32) + (1.0 if kind == "rms_unit_offset" else 0.0)


def _normalize_forward(x, scale, bias, epsilon, kind):
    x32 = _centered_f32(x, kind)
    inverse = _inverse_rms(x32, epsilon)
    # The barrier stops XLA:CPU from recomputing it at each use.
    unit = jax.lax.optimization_barrier((x32 * inverse).astype(x.dtype))
    y = unit.astype(jnp.float32) * _factor(scale, kind)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype), (unit, inverse, scale, bias)


def _normalize_backward(epsilon, kind, residuals, g):
    unit, inverse, scale, bias = residuals
    unit32, g32 = unit.astype(jnp.float32), g.astype(jnp.float32)
    rows = tuple(range(g.ndim - 1))
    dunit = g32 * _factor(scale, kind)
    inner = dunit - unit32 * jnp.mean(dunit * unit32, axis=-1, keepdims=True)
    if kind == "layer":
        inner = inner - jnp.mean(dunit, axis=-1, keepdims=True)
    dx = jax.lax.optimization_barrier(inner) * inverse
    dscale = jnp.sum(g32 * unit32, axis=rows)
    dbias = None if bias is None else jnp.sum(g32, axis=rows).astype(bias.dtype)
    return dx.astype(unit.dtype), dscale.astype(scale.dtype), dbias


def normalize_by(
    x: Float[Array, "*B D"],
    divisor: Float[Array, "*B 1"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    kind: str,
) -> Float[Array, "*B D"]:
    """`normalize` with a given divisor, such as one that is frozen; in x's dtype."""
    y = _centered_f32(x, kind) / divisor * _factor(scale, kind)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


normalize.defvjp(_normalize_forward, _normalize_backward)
