"""Multiplication of groups of rows as a kernel for GPUs, in Pallas through Triton.

XLA multiplies each row by all matrices there. The kernel cuts each group into blocks of
rows, as MegaBlocks does (Gale et al., 2022, https://arxiv.org/abs/2211.15841), and
reads no matrix of a group without rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Tiles:
    """Sizes of what a program of the grid computes; powers of two, 16 at least."""

    rows: int
    columns: int
    depth: int
    """Of the contracted axis, in a step."""
    warps: int
    stages: int
    """Steps whose inputs are on their way to shared memory at once."""


# The fastest of six on an H100, in bfloat16; see docs/decisions.md.
TILES_OF_MATRICES = Tiles(128, 256, 64, warps=8, stages=3)


def tiles_of_rows(rows_of_group: int) -> Tiles:
    """Returns the sizes for groups of so many rows on average."""
    if rows_of_group >= 128:
        return Tiles(128, 256, 64, warps=8, stages=3)
    rows = 16
    while rows < rows_of_group:
        rows *= 2
    return Tiles(rows, 64, 128, warps=4, stages=3)


def grouped_rows(
    x: Float[Array, "M _"],
    w: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    axis: int,
    tiles: Tiles,
    interpret: bool,
) -> Float[Array, "M _"]:
    """Multiplies E consecutive groups of rows of x by the matrices, with sums in f32.

    Args:
      w: of x's dtype.
      axis: of w that is contracted. With 1, x is [M, D] and the result [M, F]; with 2
        the other way around.
    """
    (M, depth), columns = x.shape, w.shape[3 - axis]
    # Each group has at most one block that is not full.
    count = M // tiles.rows + len(sizes)
    group, first, end = _blocks(sizes, tiles.rows, count)

    def body(group_ref, first_ref, end_ref, x_ref, w_ref, y_ref):
        i, j = pl.program_id(0), pl.program_id(1)
        group, first, end = group_ref[i], first_ref[i], end_ref[i]
        row, is_row = _along(first, tiles.rows, end)
        column, is_column = _along(j * tiles.columns, tiles.columns, columns)

        def step(s, acc):
            at, is_at = _along(s * tiles.depth, tiles.depth, depth)
            a = _read(x_ref, (row, at), is_row, is_at)
            if axis == 1:
                b = _read(w_ref, (group, at, column), is_at, is_column)
            else:
                b = _read(w_ref, (group, column, at), is_column, is_at)
            return acc + _dot(a, b, trans_b=axis == 2)

        # A block without rows takes no steps.
        steps = jnp.minimum(end - first, 1) * pl.cdiv(depth, tiles.depth)
        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        acc = jax.lax.fori_loop(0, steps, step, zeros)
        inside = is_row[:, None] & is_column[None, :]
        place = y_ref.at[row[:, None], column[None, :]]
        triton.store(place, acc.astype(y_ref.dtype), mask=inside)

    return _call(
        body,
        (count, pl.cdiv(columns, tiles.columns)),
        jax.ShapeDtypeStruct((M, columns), x.dtype),
        *(tiles, interpret),
    )(group, first, end, x, w)


def grouped_matrices(
    x: Float[Array, "M D"],
    g: Float[Array, "M F"],
    sizes: Int[Array, " E"],
    tiles: Tiles,
    interpret: bool,
) -> Float[Array, "E D F"]:
    """Returns x.T @ g of each group, in f32: the gradient of the matrices."""
    D, F = x.shape[1], g.shape[1]
    ends = jnp.cumsum(sizes)
    starts = ends - sizes

    def body(start_ref, end_ref, x_ref, g_ref, y_ref):
        group = pl.program_id(0)
        start, end = start_ref[group], end_ref[group]
        row, is_row = _along(pl.program_id(1) * tiles.rows, tiles.rows, D)
        column, is_column = _along(pl.program_id(2) * tiles.columns, tiles.columns, F)

        def step(s, acc):
            at, is_at = _along(start + s * tiles.depth, tiles.depth, end)
            a = _read(x_ref, (at, row), is_at, is_row)
            b = _read(g_ref, (at, column), is_at, is_column)
            return acc + _dot(a, b, trans_a=True)

        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        steps = pl.cdiv(end - start, tiles.depth)
        acc = jax.lax.fori_loop(0, steps, step, zeros)
        inside = is_row[:, None] & is_column[None, :]
        place = y_ref.at[group, row[:, None], column[None, :]]
        triton.store(place, acc, mask=inside)

    grid = (len(sizes), pl.cdiv(D, tiles.rows), pl.cdiv(F, tiles.columns))
    out = jax.ShapeDtypeStruct((len(sizes), D, F), jnp.float32)
    return _call(body, grid, out, tiles, interpret)(starts, ends, x, g)


def _blocks(
    sizes: Int[Array, " E"], rows: int, count: int
) -> tuple[Int[Array, " n"], Int[Array, " n"], Int[Array, " n"]]:
    """Returns the group, the first row and the end of the group of each of n blocks.

    Those that are not needed have no rows.
    """
    ends, counts = jnp.cumsum(sizes), -(-sizes // rows)
    last = jnp.cumsum(counts)
    number = jnp.arange(count)
    group = jnp.sum(number[:, None] >= last, axis=1, dtype=jnp.int32)
    is_needed, group = group < len(sizes), jnp.minimum(group, len(sizes) - 1)
    inside = number - (last[group] - counts[group])
    first = jnp.where(is_needed, ends[group] - sizes[group] + inside * rows, 0)
    end = jnp.where(is_needed, ends[group], 0)
    return group, first.astype(jnp.int32), end.astype(jnp.int32)


def _along(start: Any, size: int, end: Any) -> tuple[Array, Array]:
    """Returns indices from `start` on, and which of them come before `end`."""
    index = start + jnp.arange(size, dtype=jnp.int32)
    return index, index < end


def _read(ref: Any, at: tuple[Array, ...], is_row: Array, is_column: Array) -> Array:
    """Reads all rows and columns that the end of `at` names; 0 where one is outside."""
    *matrix, row, column = at
    place = ref.at[*matrix, row[:, None], column[None, :]]
    return triton.load(place, mask=is_row[:, None] & is_column[None, :], other=0)


def _dot(a: Array, b: Array, **transposed: bool) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, **transposed, precision=precision)


def _call(
    body: Callable, grid: tuple[int, ...], out: Any, tiles: Tiles, interpret: bool
) -> Callable:
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=grid,
        compiler_params=triton.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
    )
