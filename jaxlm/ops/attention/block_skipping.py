"""Which pairs of query and key blocks a kernel must visit, and which need no mask.

Kernels skip pairs of blocks that the mask hides completely, and do not mask pairs that
are completely visible. A few numbers per block decide this: XLA computes them before
the kernel starts, and the kernel reads them as scalars.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.attention.spec import Mask


class Extent(NamedTuple):
    """The range of positions and segments in a block; segments None if unused."""

    low: Any
    high: Any
    segment_low: Any = None
    segment_high: Any = None


@dataclass(frozen=True)
class Grid:
    """How queries and keys are cut into blocks. The last blocks may be partial."""

    num_queries: int
    num_keys: int
    block_queries: int
    block_keys: int

    @property
    def query_blocks(self) -> int:
        return -(-self.num_queries // self.block_queries)

    @property
    def key_blocks(self) -> int:
        return -(-self.num_keys // self.block_keys)

    @property
    def end_of_keys(self) -> int | None:
        """`num_keys` for `Mask.allowed` if the last key block is partial, else None."""
        return self.num_keys if self.num_keys % self.block_keys else None


def visibility(
    mask: Mask, queries: Extent, keys: Extent, num_keys: int
) -> tuple[Any, Any]:
    """Returns whether any score of a pair of blocks is visible, and whether all are.

    The result is conservative: "any" may be true for a hidden pair (unsorted segments),
    and "all" false for a completely visible one, but never the reverse. The extents are
    numbers or arrays that broadcast. Does not read the mask's arrays.
    """
    any_visible, all_visible = keys.low < num_keys, keys.high < num_keys
    if mask.causal:
        any_visible = any_visible & (keys.low <= queries.high)
        all_visible = all_visible & (keys.high <= queries.low)
    if mask.window is not None:
        any_visible = any_visible & (queries.low - keys.high < mask.window)
        all_visible = all_visible & (queries.high - keys.low < mask.window)
    if queries.segment_low is not None:
        any_visible = any_visible & (queries.segment_low <= keys.segment_high)
        any_visible = any_visible & (keys.segment_low <= queries.segment_high)
        # That is, all four are equal.
        all_visible = all_visible & (queries.segment_low == keys.segment_high)
        all_visible = all_visible & (keys.segment_low == queries.segment_high)
    return any_visible, all_visible


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockTable:
    """Extents and visible ranges of all blocks: int32 arrays [rows * blocks].

    `rows` is B, or 1 if all batch rows are alike. Kernels receive the table as a tree
    of references. In the methods, b is a batch row, i a query block and j a key block.
    """

    mask: Mask = field(metadata={"static": True})
    """With its static fields only; its arrays are None."""
    grid: Grid = field(metadata={"static": True})
    queries: Extent
    """Of the query blocks; positions None if they are 0 to T - 1."""
    keys: Extent
    """Of the key blocks; positions always None."""
    first_key: Any
    """The first key block that each query block visits."""
    end_key: Any
    """One past the last; equals `first_key` if there is none."""
    first_query: Any
    """The first query block that each key block visits."""
    end_query: Any
    """One past the last; equals `first_query` if there is none."""

    @property
    def rows(self) -> int:
        return self.first_key.shape[0] // self.grid.query_blocks

    def _row(self, b: Any) -> Any:
        return b if self.rows > 1 else 0

    def key_range(self, b: Any, i: Any) -> tuple[Any, Any]:
        """Returns the first key block that query block i visits, and the end."""
        at = self._row(b) * self.grid.query_blocks + i
        return self.first_key[at], self.end_key[at]

    def query_range(self, b: Any, j: Any) -> tuple[Any, Any]:
        """Returns the first query block that key block j visits, and the end."""
        at = self._row(b) * self.grid.key_blocks + j
        return self.first_query[at], self.end_query[at]

    def query_extent(self, b: Any, i: Any) -> Extent:
        at = self._row(b) * self.grid.query_blocks + i
        return _read(self.queries, at, i, self.grid.block_queries)

    def key_extent(self, b: Any, j: Any) -> Extent:
        at = self._row(b) * self.grid.key_blocks + j
        return _read(self.keys, at, j, self.grid.block_keys)

    def visibility(self, queries: Extent, keys: Extent) -> tuple[Any, Any]:
        """Calls `visibility` with this table's mask."""
        return visibility(self.mask, queries, keys, self.grid.num_keys)


def _read(extent: Extent, at: Any, block: Any, size: int) -> Extent:
    low, high, *segments = (None if x is None else x[at] for x in extent)
    if low is None:
        # Positions 0, 1, ... are computed, not stored.
        low = block * size
        high = low + size - 1
    return Extent(low, high, *segments)


class Bounds(NamedTuple):
    """Upper bounds on the blocks visited, known at trace time."""

    keys: int
    """Key blocks visited by one query block."""
    queries: int
    """Query blocks visited by one key block."""
    pairs: int
    """Pairs of blocks visited in one batch row."""


def bounds(mask: Mask, grid: Grid) -> Bounds:
    """Returns bounds that hold whatever the values of the mask's arrays."""
    if mask.query_positions is not None:
        pairs = grid.query_blocks * grid.key_blocks
        return Bounds(grid.key_blocks, grid.query_blocks, pairs)
    bare = Mask(mask.causal, mask.window)
    first_key, end_key, first_query, end_query = _ranges(
        bare, grid, *_extents(bare, grid, np), np
    )
    keys, queries = end_key - first_key, end_query - first_query
    return Bounds(int(keys.max()), int(queries.max()), int(keys.sum()))


def make_table(mask: Mask, grid: Grid) -> BlockTable:
    """Builds the table of one call."""
    queries, keys = _extents(mask, grid, jnp)
    ranges = _ranges(mask, grid, queries, keys, jnp)
    if mask.query_positions is None:
        queries = queries._replace(low=None, high=None)
    parts = (queries, keys._replace(low=None, high=None), *ranges)
    rows = max(x.shape[0] for x in jax.tree.leaves(parts))

    def flat(x):
        x = jnp.asarray(x, jnp.int32)
        return jnp.broadcast_to(x, (rows, *x.shape[1:])).reshape(-1)

    bare = Mask(mask.causal, mask.window)
    return BlockTable(bare, grid, *jax.tree.map(flat, parts))


def _extents(mask: Mask, grid: Grid, xp: Any) -> tuple[Extent, Extent]:
    """Returns the extents of the query blocks and of the key blocks, [rows, blocks]."""
    positions = xp.arange(grid.query_blocks * grid.block_queries)[None]
    if mask.query_positions is not None:
        positions = mask.query_positions
    queries = _low_and_high(positions, grid.block_queries, xp)
    # Not clipped to the keys, so that a partial last block is never all visible.
    positions = xp.arange(grid.key_blocks * grid.block_keys)[None]
    keys = _low_and_high(positions, grid.block_keys, xp)
    if mask.query_segments is None:
        return Extent(*queries), Extent(*keys)
    segments = (
        _low_and_high(mask.query_segments, grid.block_queries, xp),
        _low_and_high(mask.key_segments, grid.block_keys, xp),
    )
    return Extent(*queries, *segments[0]), Extent(*keys, *segments[1])


def _low_and_high(x: Any, block: int, xp: Any) -> tuple[Any, Any]:
    """Returns the minimum and maximum of each block: [rows, n] -> [rows, blocks]."""
    missing = -x.shape[1] % block
    # Padding repeats the last value, which does not change the extent.
    x = xp.pad(x, ((0, 0), (0, missing)), mode="edge")
    x = x.reshape(x.shape[0], -1, block)
    return x.min(axis=-1), x.max(axis=-1)


def _ranges(mask: Mask, grid: Grid, queries: Extent, keys: Extent, xp: Any):
    """Returns first_key, end_key, first_query and end_query, each [rows, blocks]."""
    column = Extent(*(None if x is None else x[:, :, None] for x in queries))
    row = Extent(*(None if x is None else x[:, None, :] for x in keys))
    any_visible, _ = visibility(mask, column, row, grid.num_keys)
    any_visible = any_visible & xp.ones((1, queries.low.shape[1], 1), bool)
    return *_first_and_end(any_visible, 2, xp), *_first_and_end(any_visible, 1, xp)


def _first_and_end(visible: Any, axis: int, xp: Any) -> tuple[Any, Any]:
    """Returns the first index of a True along the axis, and one past the last."""
    first = xp.argmax(visible, axis=axis)
    end = visible.shape[axis] - xp.argmax(xp.flip(visible, axis), axis=axis)
    return first, xp.where(visible.any(axis=axis), end, first)
