"""Which pairs of blocks are visited, checked against the mask itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks_case import slow_but

from jaxlm.ops.attention.block_skipping import Grid, bounds, make_table
from jaxlm.ops.attention.spec import Mask

B = 3


def random_mask(rng, T, S, names):
    changes = {"causal": "all keys" not in names}
    if "window" in names:
        changes["window"] = int(rng.integers(1, S))
    if "positions" in names:
        changes["query_positions"] = jnp.asarray(rng.integers(0, S, (B, T)), jnp.int32)
    if "segments" in names:
        # Unsorted, as callers may pass them.
        for side, n in (("query", T), ("key", S)):
            ids = rng.integers(0, 3, (B, n))
            changes[f"{side}_segments"] = jnp.asarray(ids, jnp.int32)
    return Mask(**changes)


NAMES = ("all keys", "window", "positions", "segments")
SETS = [s for n in range(5) for s in itertools.combinations(NAMES, n)]


QUICK = [NAMES, ("all keys", "positions")]


@pytest.mark.parametrize(
    "names", slow_but(QUICK, SETS), ids=lambda n: ", ".join(n) or "causal"
)
def test_against_the_mask(names):
    rng = np.random.default_rng(len(str(names)))
    for T, S, block_queries, block_keys in (
        (24, 24, 8, 4),
        (21, 13, 4, 8),
        (3, 30, 4, 4),
    ):
        mask, grid = (
            random_mask(rng, T, S, names),
            Grid(T, S, block_queries, block_keys),
        )
        visible = np.broadcast_to(mask.array(T, S), (B, T, S))
        table = jax.tree.map(np.asarray, make_table(mask, grid))
        most = bounds(mask, grid)
        for b in range(B):
            row = np.array([table.key_range(b, i) for i in range(grid.query_blocks)])
            column = np.array([table.query_range(b, j) for j in range(grid.key_blocks)])
            visited = 0
            for i, j in itertools.product(
                range(grid.query_blocks), range(grid.key_blocks)
            ):
                part = visible[b, i * block_queries :, j * block_keys :]
                part = part[:block_queries, :block_keys]
                extents = table.query_extent(b, i), table.key_extent(b, j)
                any_visible, all_visible = table.visibility(*extents)
                in_row = row[i][0] <= j < row[i][1]
                in_column = column[j][0] <= i < column[j][1]
                if part.any():
                    assert any_visible and in_row and in_column
                if all_visible:
                    assert part.all() and (j + 1) * block_keys <= S
                visited += int(in_row)
            assert (row[:, 1] - row[:, 0]).max() <= most.keys
            assert (column[:, 1] - column[:, 0]).max() <= most.queries
            assert visited <= most.pairs


def test_visits_are_exact_without_arrays():
    """With only causal and window, no block is visited without a visible score."""
    for window, causal in itertools.product((None, 1, 5, 16), (True, False)):
        mask = Mask(causal, window)
        met = np.asarray(mask.array(32, 32)).reshape(8, 4, 4, 8).any(axis=(1, 3))
        assert bounds(mask, Grid(32, 32, 4, 8)).pairs == met.sum()


def test_cost_grows_with_the_window_and_not_with_the_square_of_the_length():
    def most(length, window):
        return bounds(Mask(window=window), Grid(length, length, 512, 512))

    assert most(65536, 1024).pairs == pytest.approx(
        2 * most(32768, 1024).pairs, rel=0.02
    )
    assert most(32768, 1024).pairs < most(32768, None).pairs / 9
    assert most(65536, 1024).keys == 3


def test_sorted_segments_skip_whole_blocks():
    """In packed rows, only blocks with a segment in common are visited."""
    ids = jnp.repeat(jnp.arange(8), 16)[None]
    mask = Mask(query_segments=ids, key_segments=ids)
    table = make_table(mask, Grid(128, 128, 16, 16))
    np.testing.assert_array_equal(table.end_key - table.first_key, 1)
    np.testing.assert_array_equal(table.first_key, np.arange(8))
