"""Weights and cached vectors in few bits: integers, and what they are multiplied by.

Symmetric: x is close to `values * scale`, where scale is the largest magnitude of a
block over that of the integers, and 1 for a block of zeros.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxlm.ops.collectives import axes_of
from jaxlm.ops.layout import layout, reshape
from jaxlm.types import Quantized

# Values of one int4 scale: with one for each output, as int8 has it, too much is lost.
BLOCK = 32


def round_to_integers(
    x: Float[Array, "..."], axes: Sequence[int], dtype: DTypeLike
) -> tuple[Array, Float[Array, "..."]]:
    """Returns integers and their f32 scales: one for all entries along `axes`.

    Args:
      dtype: int8 or int4.

    Returns:
      The scales have size 1 along `axes`.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True)
    scale = jnp.where(largest > 0, largest / jnp.iinfo(dtype).max, 1.0)
    return jnp.round(x / scale).astype(dtype), scale


def quantize_weight(
    w: Float[Array, "..."], inputs: Sequence[int], dtype: DTypeLike
) -> Quantized:
    """Quantizes a weight: to int8 with a scale for each output, to int4 by blocks.

    A block is 32 values along the last input axis, where 32 divides what a device holds
    of it; else all of that.

    Args:
      inputs: the axes that a product sums over.
      dtype: int8 or int4.
    """
    if jnp.dtype(dtype) == jnp.int8:
        return Quantized(*round_to_integers(w, inputs, dtype))
    axis = inputs[-1]
    block = w.shape[axis] // _parts(w, axis)
    block = BLOCK if block % BLOCK == 0 else block
    values, scale = round_to_integers(_blocks(w, axis, block), [axis + 1], dtype)
    kept = [n + (n > axis) for n in range(w.ndim)]
    return Quantized(reshape(values, w.shape, kept), scale.squeeze(axis + 1))


def dequantize_weight(w: Array | Quantized, dtype: DTypeLike) -> Float[Array, "..."]:
    """Returns a weight in `dtype`, also one that is not quantized."""
    if not isinstance(w, Quantized):
        return w.astype(dtype)
    scale = w.scale
    for axis, (size, count) in enumerate(zip(w.shape, scale.shape, strict=True)):
        if 1 < count < size:
            shape = (*scale.shape[: axis + 1], size // count, *scale.shape[axis + 1 :])
            scale = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), shape)
            kept = [n + (n > axis) for n in range(w.ndim)]
            shape = (*shape[:axis], size, *shape[axis + 2 :])
            scale = reshape(scale, shape, kept)
    return (w.values.astype(jnp.float32) * scale).astype(dtype)


def _blocks(x: Array, axis: int, size: int) -> Array:
    """Splits an axis into blocks of `size`: [.., n, ..] -> [.., n / size, size, ..]."""
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    kept = [*range(axis + 1), None, *range(axis + 1, x.ndim)]
    return reshape(x, shape, kept)


def _parts(x: Array, axis: int) -> int:
    """Returns into how many parts the mesh cuts an axis."""
    sharding = layout(x)
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[a] for a in axes_of(sharding.spec[axis]))
