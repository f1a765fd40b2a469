"""Which blocks of keys a block of queries meets, from a few numbers for each block.

Hidden pairs of blocks are skipped, and pairs that are visible as a whole need no mask.
XLA makes the numbers before a kernel starts; the kernel reads them as scalars.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.attention.spec import Mask


class Extent(NamedTuple):
    """Least and greatest position and segment in a block; segments None if unused."""

    low: Any
    high: Any
    segment_low: Any = None
    segment_high: Any = None


@dataclass(frozen=True)
class Grid:
    """How queries and keys are cut into blocks. The last blocks may reach over."""

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
        """`num_keys` where the last block of keys reaches over, for `Mask.allowed`."""
        return self.num_keys if self.num_keys % self.block_keys else None


def meet(mask: Mask, queries: Extent, keys: Extent, num_keys: int) -> tuple[Any, Any]:
    """Whether a pair of blocks has visible scores, and whether all of them are.

    The first may be true for a hidden pair (segments that are not sorted), the second
    false for one that is visible as a whole; never the other way about. Numbers or
    arrays that broadcast; the mask's own arrays are not read.
    """
    some, whole = keys.low < num_keys, keys.high < num_keys
    if mask.causal:
        some = some & (keys.low <= queries.high)
        whole = whole & (keys.high <= queries.low)
    if mask.window is not None:
        some = some & (queries.low - keys.high < mask.window)
        whole = whole & (queries.high - keys.low < mask.window)
    if queries.segment_low is not None:
        some = some & (queries.segment_low <= keys.segment_high)
        some = some & (keys.segment_low <= queries.segment_high)
        # All four are equal.
        whole = whole & (queries.segment_low == keys.segment_high)
        whole = whole & (keys.segment_low == queries.segment_high)
    return some, whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockTable:
    """The numbers of all blocks, int32, [rows * blocks]; rows are B, or 1 for all.

    A kernel gets it as a tree of references. In the methods b is a row of the batch, i
    a block of queries and j a block of keys.
    """

    mask: Mask = field(metadata={"static": True})
    """Without its arrays."""
    grid: Grid = field(metadata={"static": True})
    queries: Extent
    """Of the query blocks; positions None where they are 0 to T - 1."""
    keys: Extent
    """Of the key blocks; positions always None."""
    first_key: Any
    """First key block that each query block meets."""
    last_key: Any
    """Last one, and 1; `first_key` where there is none."""
    first_query: Any
    """First query block that each key block meets."""
    last_query: Any
    """Last one, and 1."""

    @property
    def rows(self) -> int:
        return self.first_key.shape[0] // self.grid.query_blocks

    def _row(self, b: Any) -> Any:
        return b if self.rows > 1 else 0

    def keys_met(self, b: Any, i: Any) -> tuple[Any, Any]:
        """First and last + 1 of the key blocks that query block i meets."""
        at = self._row(b) * self.grid.query_blocks + i
        return self.first_key[at], self.last_key[at]

    def queries_met(self, b: Any, j: Any) -> tuple[Any, Any]:
        """First and last + 1 of the query blocks that key block j meets."""
        at = self._row(b) * self.grid.key_blocks + j
        return self.first_query[at], self.last_query[at]

    def query_extent(self, b: Any, i: Any) -> Extent:
        at = self._row(b) * self.grid.query_blocks + i
        return _read(self.queries, at, i, self.grid.block_queries)

    def key_extent(self, b: Any, j: Any) -> Extent:
        at = self._row(b) * self.grid.key_blocks + j
        return _read(self.keys, at, j, self.grid.block_keys)

    def meet(self, queries: Extent, keys: Extent) -> tuple[Any, Any]:
        """`meet` under this table's mask."""
        return meet(self.mask, queries, keys, self.grid.num_keys)


def _read(extent: Extent, at: Any, block: Any, size: int) -> Extent:
    low, high, *segments = (None if x is None else x[at] for x in extent)
    if low is None:
        # Positions in order need no reading.
        low = block * size
        high = low + size - 1
    return Extent(low, high, *segments)


class Bounds(NamedTuple):
    """What is known of a grid when it is traced."""

    keys: int
    """Key blocks that any one query block meets, at most."""
    queries: int
    """Query blocks that any one key block meets, at most."""
    pairs: int
    """Pairs of blocks that meet, in one row of the batch, at most."""


def bounds(mask: Mask, grid: Grid) -> Bounds:
    """Bounds that hold whatever the mask's arrays are."""
    if mask.query_positions is not None:
        pairs = grid.query_blocks * grid.key_blocks
        return Bounds(grid.key_blocks, grid.query_blocks, pairs)
    bare = Mask(mask.causal, mask.window)
    first_key, last_key, first_query, last_query = _ranges(
        bare, grid, *_extents(bare, grid, np), np
    )
    keys, queries = last_key - first_key, last_query - first_query
    return Bounds(int(keys.max()), int(queries.max()), int(keys.sum()))


def make_table(mask: Mask, grid: Grid) -> BlockTable:
    """The table of one call."""
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
    """`Extent`s of the query and of the key blocks, [rows, blocks]."""
    positions = xp.arange(grid.query_blocks * grid.block_queries)[None]
    if mask.query_positions is not None:
        positions = mask.query_positions
    queries = _least_and_greatest(positions, grid.block_queries, xp)
    # A last block that reaches over the keys is never visible as a whole.
    positions = xp.arange(grid.key_blocks * grid.block_keys)[None]
    keys = _least_and_greatest(positions, grid.block_keys, xp)
    if mask.query_segments is None:
        return Extent(*queries), Extent(*keys)
    segments = (
        _least_and_greatest(mask.query_segments, grid.block_queries, xp),
        _least_and_greatest(mask.key_segments, grid.block_keys, xp),
    )
    return Extent(*queries, *segments[0]), Extent(*keys, *segments[1])


def _least_and_greatest(x: Any, block: int, xp: Any) -> tuple[Any, Any]:
    """[rows, n] -> the least and greatest number of each block, [rows, blocks]."""
    missing = -x.shape[1] % block
    # The last number repeats, so that padding is within the extent.
    x = xp.pad(x, ((0, 0), (0, missing)), mode="edge")
    x = x.reshape(x.shape[0], -1, block)
    return x.min(axis=-1), x.max(axis=-1)


def _ranges(mask: Mask, grid: Grid, queries: Extent, keys: Extent, xp: Any):
    """First and last + 1 of the blocks met, of both sides, [rows, blocks]."""
    column = Extent(*(None if x is None else x[:, :, None] for x in queries))
    row = Extent(*(None if x is None else x[:, None, :] for x in keys))
    some, _ = meet(mask, column, row, grid.num_keys)
    some = some & xp.ones((1, queries.low.shape[1], 1), bool)
    return *_first_and_last(some, 2, xp), *_first_and_last(some, 1, xp)


def _first_and_last(some: Any, axis: int, xp: Any) -> tuple[Any, Any]:
    first = xp.argmax(some, axis=axis)
    last = some.shape[axis] - xp.argmax(xp.flip(some, axis), axis=axis)
    return first, xp.where(some.any(axis=axis), last, first)
