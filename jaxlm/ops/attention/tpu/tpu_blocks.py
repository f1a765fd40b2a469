"""What the TPU kernels share: settings, blocks, masking, and the launch.

Blocks are [tokens, head_dim], so callers transpose arrays to [B, heads, tokens, H].
Nothing is padded: in a partial last block the rest is garbage (NaN in interpret mode),
which kernels hide or zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxlm.ops.attention.block_skipping import BlockTable, Grid, make_table
from jaxlm.ops.attention.spec import AttentionSpec, Mask, Tokens

LANES = 128


@dataclass(frozen=True)
class TpuSettings:
    """Block sizes in tokens: multiples of 128 on a device."""

    block_queries: int = 512
    block_keys: int = 512
    backward_block_queries: int = 512
    backward_block_keys: int = 512
    decode_block_keys: int = 1024
    decode_splits: int = 1
    """Number of splits of a row's keys when decoding: for chips with two cores, when
    batch rows times heads are fewer than the cores."""
    interpret: bool = False
    """Run on any device, without Mosaic, for tests."""


def cut_blocks(
    spec: AttentionSpec, T: int, S: int, blocks: tuple[int, int], splits: int = 1
) -> BlockTable:
    """Builds the table of a kernel; with splits, one row per split of each batch row.

    Args:
      blocks: tokens per query block and per key block.
    """
    # No block is longer than its sequence, in whole lanes. Few queries, as in decoding,
    # are a block of just as many rows.
    rows, columns = (
        min(block, pl.cdiv(n, LANES) * LANES)
        for n, block in zip((T, S), blocks, strict=True)
    )
    rows = min(rows, T) if T < LANES else rows
    table = make_table(spec.mask, Grid(T, S, rows, columns))
    return _split(table, splits) if splits > 1 else table


def _split(table: BlockTable, splits: int) -> BlockTable:
    """Returns a table with one row per split of each row's key blocks."""
    rows = table.rows

    def repeat(x: Array) -> Array:
        x = x.reshape(rows, 1, -1)
        return jnp.broadcast_to(x, (x.shape[0], splits, x.shape[2]))

    table = jax.tree.map(repeat, table)
    share = -(-(table.end_key - table.first_key) // splits)
    first = table.first_key + share * jnp.arange(splits)[:, None]
    end = jnp.minimum(first + share, table.end_key)
    # An empty split must not point past the last block.
    first, end = (jnp.where(first < end, x, 0) for x in (first, end))
    table = replace(table, first_key=first, end_key=end)
    return jax.tree.map(jnp.ravel, table)


def key_block(table: BlockTable, b: Any, i: Any, step: Any) -> Any:
    """Returns the key block that query block i visits at this step, or its last."""
    first, end = table.key_range(b, i)
    return jnp.minimum(first + step, jnp.maximum(end - 1, first))


def query_block(table: BlockTable, b: Any, j: Any, step: Any) -> Any:
    """Returns the query block that key block j visits at this step, or its last."""
    first, end = table.query_range(b, j)
    return jnp.minimum(first + step, jnp.maximum(end - 1, first))


def heads_first(x: Array) -> Array:
    """Transposes [B, tokens, heads, H] to [B, heads, tokens, H], or back."""
    return x.transpose(0, 2, 1, 3)


def dot(a: Any, b: Any, dims: Any) -> Any:
    """Dot product that accumulates in f32 and does not round f32 operands."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (dims, ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


def fill_after(x: Any, start: Any, end: int, axis: int = 0, fill: float = 0.0) -> Any:
    """Replaces x by `fill` at positions from `end` on; x begins at position `start`."""
    position = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(position < end, x, jnp.full_like(x, fill))


def input_specs(
    mask: Mask, grid: Grid, inputs: dict[str, Array], queries: Callable, keys: Callable
) -> tuple[dict[str, Array], dict[str, pl.BlockSpec]]:
    """Adds the mask's arrays, as [B, 1, tokens], and returns inputs and block specs.

    Args:
      inputs: [B, heads, tokens, H] or [B, heads, 1, tokens].
      queries, keys: map the grid indices to (b, head, block).
    """
    inputs = dict(inputs)
    B, _, _, H = inputs["q"].shape
    for name in ("query_positions", "query_segments", "key_segments"):
        x = getattr(mask, name)
        if x is not None:
            inputs[name] = jnp.broadcast_to(x, (B, x.shape[1]))[:, None]

    def spec(name: str) -> pl.BlockSpec:
        of_keys = name in ("k", "v", "value_scale") or name.startswith("key")
        at, size = (keys, grid.block_keys) if of_keys else (queries, grid.block_queries)

        def matrix(*ids):
            return *at(*ids), 0

        def vector(*ids):
            b, n, block = at(*ids)
            return b, n, 0, block

        def mask_row(*ids):
            b, _, block = at(*ids)
            return b, 0, block

        if name in ("q", "k", "v", "dz"):
            return pl.BlockSpec((1, 1, size, H), matrix)
        if inputs[name].ndim == 4:
            return pl.BlockSpec((1, 1, 1, size), vector)
        return pl.BlockSpec((1, 1, size), mask_row)

    return inputs, {name: spec(name) for name in inputs}


def allowed(table: BlockTable, refs, i, j, keys_first: bool = False) -> Any:
    """`Mask.allowed` for query block i and key block j."""
    grid = table.grid
    query_axis, key_axis = (1, 0) if keys_first else (0, 1)

    def iota(start: Any, size: int, axis: int) -> Any:
        shape = (size, 1) if axis == 0 else (1, size)
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def read(name: str, axis: int) -> Any:
        if name not in refs:
            return None
        row = refs[name][0]
        return row if axis == 1 else row.T

    positions = read("query_positions", query_axis)
    if positions is None:
        positions = iota(i * grid.block_queries, grid.block_queries, query_axis)
    queries = Tokens(positions, read("query_segments", query_axis))
    positions = iota(j * grid.block_keys, grid.block_keys, key_axis)
    keys = Tokens(positions, read("key_segments", key_axis))
    return table.mask.allowed(queries, keys, grid.end_of_keys)


def visit_pair(
    table: BlockTable,
    b: Any,
    i: Any,
    j: Any,
    visit: Callable[[bool], None],
    in_range: Any,
    is_full: Any = None,
) -> None:
    """Calls `visit(masked)` for query block i and key block j, unless all is hidden.

    Args:
      table: the table of the kernel.
      b: the row of the batch.
      i: the query block.
      j: the key block.
      visit: the work; it masks nothing if its argument is False.
      in_range: whether the pair is one of those to visit.
      is_full: whether the query block has no garbage; None: it never has.
    """
    any_visible, all_visible = table.visibility(
        table.query_extent(b, i), table.key_extent(b, j)
    )
    any_visible &= in_range
    if is_full is not None:
        all_visible &= is_full
    pl.when(any_visible & all_visible)(partial(visit, False))
    pl.when(any_visible & ~all_visible)(partial(visit, True))


def run_kernel(
    kernel: Callable,
    table: BlockTable,
    inputs: dict[str, Array],
    in_specs: dict[str, pl.BlockSpec],
    *,
    grid: tuple[int, ...],
    out_specs: Any,
    out_shape: Any,
    scratch: list[tuple[int, int]],
    matmuls: int,
    settings: TpuSettings,
):
    """Runs a kernel that accumulates over the grid axes after the third.

    Args:
      matmuls: block-sized matmuls per batch row and query head, for the cost estimate.
    """
    B, N, _, H = inputs["q"].shape
    area = table.grid.block_queries * table.grid.block_keys
    leaves = jax.tree.leaves((inputs, out_shape))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[in_specs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * B * N * area * H,
            transcendentals=matmuls * B * N * area // 2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in leaves),
        ),
        interpret=settings.interpret,
    )(table, inputs)
