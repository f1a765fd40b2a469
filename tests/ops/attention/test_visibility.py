"""Which pairs of blocks kernels visit, against the mask itself."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.attention.mask import attention_mask
from jaxlm.ops.attention.spec import AttentionSpec
from jaxlm.ops.attention.visibility import Extent, Grid, bounds, make_table, meet

B = 3


def mask_of(spec, T, S):
    """[B, T, S], by its definition."""
    index = jnp.arange(T)[None] if spec.query_index is None else spec.query_index
    mask = attention_mask(
        index,
        jnp.arange(S),
        causal=spec.causal,
        window=spec.window,
        query_segments=spec.query_segments,
        key_segments=spec.key_segments,
        key_length=spec.key_length,
    )
    return np.broadcast_to(mask, (B, T, S))


def random_spec(rng, T, S, names):
    spec = AttentionSpec(scale=1.0, causal="all keys" not in names)
    changes = {}
    if "window" in names:
        changes["window"] = int(rng.integers(1, S))
    if "places" in names:
        changes["query_index"] = jnp.asarray(rng.integers(0, S, (B, T)), jnp.int32)
    if "length" in names:
        changes["key_length"] = jnp.asarray(rng.integers(0, S + 1, B), jnp.int32)
    if "segments" in names:
        # Not sorted: as a caller may give them.
        for side, n in (("query", T), ("key", S)):
            ids = rng.integers(0, 3, (B, n))
            changes[f"{side}_segments"] = jnp.asarray(ids, jnp.int32)
    return dataclasses.replace(spec, **changes)


def of_row(x, row, rows):
    return np.asarray(x).reshape(rows, -1)[row if rows > 1 else 0]


NAMES = ("all keys", "window", "places", "length", "segments")
SETS = [s for n in range(6) for s in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("names", SETS, ids=lambda n: ", ".join(n) or "causal")
def test_against_the_mask(names):
    rng = np.random.default_rng(len(str(names)))
    for T, S, block_queries, block_keys in (
        (24, 24, 8, 4),
        (21, 13, 4, 8),
        (3, 30, 4, 4),
    ):
        spec = random_spec(rng, T, S, names)
        mask, grid = mask_of(spec, T, S), Grid(T, S, block_queries, block_keys)
        table, most = make_table(spec, grid), bounds(spec, grid)
        rows = table.length.shape[0]
        visited = 0
        for b in range(B):
            row = [of_row(x, b, rows) for x in (table.first_key, table.last_key)]
            column = [of_row(x, b, rows) for x in (table.first_query, table.last_query)]
            visited = 0
            for i, j in itertools.product(
                range(grid.query_blocks), range(grid.key_blocks)
            ):
                part = mask[b, i * block_queries :, j * block_keys :]
                part = part[:block_queries, :block_keys]

                def extent(e, at, b=b, rows=rows):
                    return Extent(
                        *(None if x is None else of_row(x, b, rows)[at] for x in e)
                    )

                some, whole = meet(
                    extent(table.queries, i),
                    extent(table.keys, j),
                    of_row(table.length, b, rows)[0],
                    causal=spec.causal,
                    window=spec.window,
                )
                in_row = row[0][i] <= j < row[1][i]
                in_column = column[0][j] <= i < column[1][j]
                if part.any():
                    assert some and in_row and in_column
                if whole:
                    assert part.all() and (j + 1) * block_keys <= S
                visited += int(in_row)
            assert (row[1] - row[0]).max() <= most.keys
            assert (column[1] - column[0]).max() <= most.queries
            assert visited <= most.pairs


def test_visits_are_exact_without_arrays():
    """Causal and window alone: not one block more than the mask shows."""
    for window, causal in itertools.product((None, 1, 5, 16), (True, False)):
        spec = AttentionSpec(scale=1.0, window=window, causal=causal)
        mask = mask_of(spec, 32, 32)[0].reshape(8, 4, 4, 8).any(axis=(1, 3))
        assert bounds(spec, Grid(32, 32, 4, 8)).pairs == mask.sum()


def test_cost_grows_with_the_window_and_not_with_the_square_of_the_length():
    def pairs(length, window):
        return bounds(
            AttentionSpec(scale=1.0, window=window), Grid(length, length, 512, 512)
        ).pairs

    assert pairs(65536, 1024) == pytest.approx(2 * pairs(32768, 1024), rel=0.02)
    assert pairs(32768, 1024) < pairs(32768, None) / 9
    assert (
        bounds(AttentionSpec(scale=1.0, window=1024), Grid(65536, 65536, 512, 512)).keys
        == 3
    )


def test_sorted_segments_skip_whole_blocks():
    """Packed rows: the blocks visited are those where segments meet."""
    ids = jnp.repeat(jnp.arange(8), 16)[None]
    spec = AttentionSpec(scale=1.0, query_segments=ids, key_segments=ids)
    table = make_table(spec, Grid(128, 128, 16, 16))
    np.testing.assert_array_equal(table.last_key - table.first_key, 1)
    np.testing.assert_array_equal(table.first_key, np.arange(8))
