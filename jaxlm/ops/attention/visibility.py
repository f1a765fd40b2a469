"""Which blocks of keys a block of queries meets, from a few numbers for each block.

Hidden blocks are skipped, and blocks of which everything is visible need no mask. The
numbers are made by XLA before a kernel starts; a kernel reads them as scalars.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.attention.spec import AttentionSpec


class Extent(NamedTuple):
    """The least and greatest place and segment in a block; segments None if unused."""

    low: Any
    high: Any
    segment_low: Any = None
    segment_high: Any = None


def meet(
    queries: Extent, keys: Extent, length: Any, *, causal: bool, window: int | None
) -> tuple[Any, Any]:
    """Whether a pair of blocks has visible scores, and whether all of them are.

    The first may be true for a hidden pair (segments that are not sorted), the second
    false for one that is visible as a whole; never the other way about. Numbers or
    arrays that broadcast.

    Args:
      length: keys from this place on are hidden.
    """
    some, whole = keys.low < length, keys.high < length
    if causal:
        some = some & (keys.low <= queries.high)
        whole = whole & (keys.high <= queries.low)
    if window is not None:
        some = some & (queries.low - keys.high < window)
        whole = whole & (queries.high - keys.low < window)
    if queries.segment_low is not None:
        some = some & (queries.segment_low <= keys.segment_high)
        some = some & (keys.segment_low <= queries.segment_high)
        # All four are equal.
        whole = whole & (queries.segment_low == keys.segment_high)
        whole = whole & (keys.segment_low == queries.segment_high)
    return some, whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """The numbers of all blocks, int32, [rows * blocks]; rows are B, or 1 for all.

    A kernel gets it as a tree of references.
    """

    queries: Any
    """`Extent` of the query blocks."""
    keys: Any
    """`Extent` of the key blocks."""
    length: Any
    """[rows]"""
    first_key: Any
    """First key block that each query block meets."""
    last_key: Any
    """Last one, and 1; `first_key` where there is none."""
    first_query: Any
    """First query block that each key block meets."""
    last_query: Any
    """Last one, and 1."""


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


class Bounds(NamedTuple):
    """What is known of a grid when it is traced."""

    keys: int
    """Key blocks that any one query block meets, at most."""
    queries: int
    """Query blocks that any one key block meets, at most."""
    pairs: int
    """Pairs of blocks that meet, in one row of the batch, at most."""


def bounds(spec: AttentionSpec, grid: Grid) -> Bounds:
    """Bounds that hold whatever the spec's arrays are."""
    if spec.query_index is not None:
        pairs = grid.query_blocks * grid.key_blocks
        return Bounds(grid.key_blocks, grid.query_blocks, pairs)
    bare = AttentionSpec(scale=1.0, causal=spec.causal, window=spec.window)
    first_key, last_key, first_query, last_query = _ranges(
        bare, *_extents(bare, grid, np), np
    )
    keys, queries = last_key - first_key, last_query - first_query
    return Bounds(int(keys.max()), int(queries.max()), int(keys.sum()))


def make_table(spec: AttentionSpec, grid: Grid) -> Table:
    """The table of one call."""
    queries, keys, length = _extents(spec, grid, jnp)
    ranges = _ranges(spec, queries, keys, length, jnp)
    parts = (queries, keys, length, *ranges)
    rows = max(x.shape[0] for x in jax.tree.leaves(parts))

    def flat(x):
        x = jnp.asarray(x, jnp.int32)
        return jnp.broadcast_to(x, (rows, *x.shape[1:])).reshape(-1)

    return Table(*jax.tree.map(flat, parts))


def _extents(spec: AttentionSpec, grid: Grid, xp: Any) -> tuple[Extent, Extent, Any]:
    """`Extent`s [rows, blocks] and key lengths [rows]."""
    places = xp.arange(grid.query_blocks * grid.block_queries)[None]
    if spec.query_index is not None:
        places = spec.query_index
    queries = _least_and_greatest(places, grid.block_queries, xp)
    # A last block that reaches over the keys is never visible as a whole.
    keys = xp.arange(grid.key_blocks * grid.block_keys)[None]
    keys = _least_and_greatest(keys, grid.block_keys, xp)
    query_segments, key_segments = (), ()
    if spec.query_segments is not None:
        query_segments = _least_and_greatest(
            spec.query_segments, grid.block_queries, xp
        )
        key_segments = _least_and_greatest(spec.key_segments, grid.block_keys, xp)
    length = xp.full((1,), grid.num_keys)
    if spec.key_length is not None:
        length = xp.minimum(spec.key_length, grid.num_keys)
    return Extent(*queries, *query_segments), Extent(*keys, *key_segments), length


def _least_and_greatest(x: Any, block: int, xp: Any) -> tuple[Any, Any]:
    """[rows, n] -> the least and greatest number of each block, [rows, blocks]."""
    missing = -x.shape[1] % block
    # The last number repeats, so that padding is within the extent.
    x = xp.pad(x, ((0, 0), (0, missing)), mode="edge")
    x = x.reshape(x.shape[0], -1, block)
    return x.min(axis=-1), x.max(axis=-1)


def _ranges(spec: AttentionSpec, queries: Extent, keys: Extent, length: Any, xp: Any):
    """First and last + 1 of the blocks met, of both sides, [rows, blocks]."""
    column = Extent(*(None if x is None else x[:, :, None] for x in queries))
    row = Extent(*(None if x is None else x[:, None, :] for x in keys))
    some, _ = meet(
        column, row, length[:, None, None], causal=spec.causal, window=spec.window
    )
    some = some & xp.ones((1, queries.low.shape[1], 1), bool)
    return *_first_and_last(some, 2, xp), *_first_and_last(some, 1, xp)


def _first_and_last(some: Any, axis: int, xp: Any) -> tuple[Any, Any]:
    first = xp.argmax(some, axis=axis)
    last = some.shape[axis] - xp.argmax(xp.flip(some, axis), axis=axis)
    return first, xp.where(some.any(axis=axis), last, first)
