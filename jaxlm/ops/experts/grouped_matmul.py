"""Multiplication of groups of rows, each by a matrix of its own."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.ops.attention.request import target
from jaxlm.ops.collectives import all_gather_parts, psum_scatter_parts
from jaxlm.ops.experts.grouped_matmul_kernel import (
    TILES_OF_MATRICES,
    grouped_matrices,
    grouped_rows,
    tiles_of_rows,
)
from jaxlm.ops.quantization import dequantize_weight
from jaxlm.types import Quantized


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"] | Quantized,
    sizes: Int[Array, " E"],
    *,
    cut: tuple[Any, tuple[str, ...]] | None = None,
    implementation: str = "auto",
) -> Float[Array, "M F"]:
    """Multiplies E consecutive groups of rows of x, each by a matrix of its own.

    The matrices are cast to x's dtype, sums are f32, and the gradient of the matrices
    has their dtype; quantized ones have none.

    Args:
      sizes: number of rows in each group. Rows after the last group have results
        without meaning.
      cut: the partition of w, a tree as w is, and the mesh axes along which this device
        has a part of it, inside a `shard_map`: gathered in x's dtype, and its gradient
        is added up and cut. None: all of it is here.
      implementation: `ragged_dot` leaves it to XLA, which has an instruction for it on
        TPUs, but elsewhere multiplies each row by all E matrices; `blocks` loops over
        blocks of rows of one group, for the CPU; `kernel` is one for GPUs; `auto` takes
        what is made for the device.
    """
    if implementation == "auto":
        implementation = AUTO[target()[0]]
    return _grouped(implementation, cut, x, w, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(implementation, cut, x, w, sizes):
    return _grouped_forward(implementation, cut, x, w, sizes)[0]


def _grouped_forward(implementation, cut, x, w, sizes):
    rows, _ = IMPLEMENTATIONS[implementation]
    # The backward pass, too, uses what was gathered here.
    whole = w if cut is None else _gathered(w, cut, x.dtype)
    return rows(x, whole, sizes, 1), (x, w, whole, sizes)


def _gathered(w, cut, dtype):
    partition, axes = cut
    w = w if isinstance(w, Quantized) else w.astype(dtype)
    return jax.tree.map(lambda x, p: all_gather_parts(x, p, axes), w, partition)


def _grouped_backward(implementation, cut, residuals, g):
    x, w, whole, sizes = residuals
    rows, matrices = IMPLEMENTATIONS[implementation]
    g = g.astype(x.dtype)
    dw = None
    if not isinstance(w, Quantized):
        dw = matrices(x, g, sizes)
        if cut is not None:
            with jax.named_scope("weight_gradient"):
                dw = psum_scatter_parts(dw, *cut)
        dw = dw.astype(w.dtype)
    return rows(g, whole, sizes, 2), dw, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _ragged(x, w, sizes, contracted, ragged, group) -> Array:
    """Calls `ragged_dot_general` with f32 sums, contracting one axis of each array."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contracted[0],), (contracted[1],)), ((), ())),
        lhs_ragged_dimensions=[ragged],
        rhs_group_dimensions=group,
    )
    return jax.lax.ragged_dot_general(
        x, w, sizes, numbers, preferred_element_type=jnp.float32
    )


def _ragged_rows(x, w, sizes, axis):
    y = _ragged(x, dequantize_weight(w, x.dtype), sizes, (1, axis), 0, [0])
    return y.astype(x.dtype)


def _ragged_matrices(x, g, sizes):
    return _ragged(x, g, sizes, (0, 0), 0, [])


def _blocks(
    sizes: Int[Array, " E"], num_rows: int
) -> tuple[int, Int[Array, ""], Callable[[Any], tuple[Array, Array, Array]]]:
    """Plans blocks of rows that cover the groups; the last one may overlap the next.

    Returns:
      The number of rows per block; the number of blocks; and a function from the index
      of a block to (group, first row, end of the group). Groups without rows have no
      blocks, so decoding a few tokens reads only the matrices that they need.
    """
    # Half the rows of an average group: larger blocks compute more rows of the next
    # group in vain, smaller ones copy each matrix more often. XLA:CPU has no fast
    # bfloat16 matmul for a single row.
    size = 2
    while size < min(num_rows // (2 * len(sizes)), 128):
        size *= 2
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // size)
    last = jnp.cumsum(counts)

    def block(i):
        group = jnp.sum(i >= last)
        inside = i - (last[group] - counts[group])
        return group, ends[group] - sizes[group] + inside * size, ends[group]

    return size, last[-1], block


# Jitted, so that outside of a jit the loop is not compiled again for each layer.
@partial(jax.jit, static_argnames="axis")
def _block_rows(x, w, sizes, axis):
    size, count, block = _blocks(sizes, len(x))
    # The last block may reach beyond the last row.
    x = jnp.pad(x, ((0, size), (0, 0)))

    def one(i, y):
        group, first, _ = block(i)
        rows = jax.lax.dynamic_slice_in_dim(x, first, size)
        out = jax.lax.dot_general(
            rows,
            dequantize_weight(jax.tree.map(itemgetter(group), w), x.dtype),
            (((1,), (axis - 1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        # Rows of the next group are wrong here; its own blocks overwrite them later.
        return jax.lax.dynamic_update_slice_in_dim(y, out.astype(x.dtype), first, 0)

    columns = w.shape[3 - axis]
    y = jax.lax.fori_loop(0, count, one, jnp.zeros((len(x), columns), x.dtype))
    return y[: len(x) - size]


@jax.jit
def _block_matrices(x, g, sizes):
    size, count, block = _blocks(sizes, len(x))
    x, g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))

    def two(rows: Array) -> Array:
        """Splits the rows: XLA:CPU is fast in bfloat16 with two contracted axes."""
        return rows.reshape(2, size // 2, rows.shape[1])

    def one(i, dw):
        group, first, end = block(i)
        inside = first + jnp.arange(size) < end
        rows = jax.lax.dynamic_slice_in_dim(g, first, size)
        rows = jnp.where(inside[:, None], rows, 0)
        new = jnp.einsum(
            "abd,abf->df",
            two(jax.lax.dynamic_slice_in_dim(x, first, size)),
            two(rows),
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_index_in_dim(dw, dw[group] + new, group, 0)

    shape = (len(sizes), x.shape[1], g.shape[1])
    return jax.lax.fori_loop(0, count, one, jnp.zeros(shape, jnp.float32))


def _kernel_rows(x, w, sizes, axis):
    w = dequantize_weight(w, x.dtype)
    tiles = tiles_of_rows(len(x) // len(sizes))
    return grouped_rows(x, w, sizes, axis, tiles, interpret=target()[0] == "cpu")


def _kernel_matrices(x, g, sizes):
    tiles = TILES_OF_MATRICES
    return grouped_matrices(x, g, sizes, tiles, interpret=target()[0] == "cpu")


# Each is two functions: rows(x, w, sizes, axis of w to contract), and the gradient of
# the matrices(x, g, sizes).
IMPLEMENTATIONS = {
    "ragged_dot": (_ragged_rows, _ragged_matrices),
    "blocks": (_block_rows, _block_matrices),
    "kernel": (_kernel_rows, _kernel_matrices),
}
AUTO = {"cpu": "blocks", "gpu": "kernel", "tpu": "ragged_dot"}
