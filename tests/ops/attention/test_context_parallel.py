"""Rows that are cut over devices: their order, and how even the work is.

Values and gradients on several devices are in tests/multi_device/test_context.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.attention.block_skipping import Grid, make_table
from jaxlm.ops.attention.context_parallel import (
    Cut,
    from_zigzag,
    piece_masks,
    to_zigzag,
)
from jaxlm.ops.attention.dispatch import choose
from jaxlm.ops.attention.request import request_of_sizes
from jaxlm.ops.attention.spec import Mask


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_each_device_has_an_early_and_a_late_piece(devices):
    row = jnp.arange(16)[None]
    zigzag = to_zigzag(row, devices)
    assert (from_zigzag(zigzag, devices) == row).all()
    cut, length = Cut("context", devices, zigzag=True), 16 // devices
    for device in range(devices):
        held = zigzag[0, device * length :][:length]
        assert (held == cut.positions(device, length)).all()
    if devices == 4:
        assert zigzag[0].tolist() == [
            *(0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9)
        ]


def blocks_of(cut, device, length, window):
    """Pairs of blocks of 32 x 32 that a device visits, in a whole round."""
    visited = 0
    for keys in range(cut.devices):
        masks = piece_masks(Mask(window=window), cut, device, keys, length)
        for piece, mask in masks:
            table = make_table(mask, Grid(length, piece.stop - piece.start, 32, 32))
            visited += int(jnp.sum(table.end_key - table.first_key))
    return visited


@pytest.mark.parametrize("window, least", [(None, 0.9), (300, 0.7)])
def test_in_zigzag_order_the_work_is_even(window, least):
    """In row order it is not; with a window, the first tokens see fewer keys anyway."""
    length = 4096 // 8
    work = {
        zigzag: [
            blocks_of(Cut("context", 8, zigzag), device, length, window)
            for device in range(8)
        ]
        for zigzag in (True, False)
    }
    assert min(work[True]) > least * max(work[True])
    if window is None:
        assert min(work[False]) < 0.1 * max(work[False])
    # No pair of blocks is visited for nothing.
    distance = np.subtract.outer(np.arange(128), np.arange(128))
    visible = (distance >= 0) & (32 * (distance - 1) + 1 < (window or np.inf))
    assert sum(work[True]) == sum(work[False]) == visible.sum()


def test_what_runs_on_rows_that_are_cut():
    sizes = {"batch": 1, "num_queries": 4096, "num_keys": 4096, "num_heads": 8}
    sizes |= {"num_kv_heads": 2, "head_dim": 64, "dtype": jnp.float32}
    whole = request_of_sizes(**sizes, segments=True)
    choice = choose("auto", whole, 4)
    assert (choice.name, choice.across) == ("xla", "ring")
    assert str(choice).startswith("auto took xla by ring; ")
    assert choose("auto", whole, 4, "gather").across == "gather"
    assert choose("reference", whole, 4).across == "gather"
    assert choose("reference", whole).across is None
    with pytest.raises(
        ValueError, match=r"'reference': no ring, since .* or one of xla"
    ):
        choose("reference", whole, 4, "ring")
    short = request_of_sizes(**sizes | {"num_queries": 64, "num_keys": 64})
    assert choose("auto", short, 4).across == "gather"
    assert choose("auto", short, 4, "ring").name == "xla"


def test_a_plain_reading_of_the_positions():
    """The mask of a piece is the part of the row's mask for these tokens."""
    cut, length, mask = Cut("context", 2, zigzag=True), 8, Mask(window=5)
    whole = np.asarray(mask.array(16, 16))[0]
    row = np.asarray(to_zigzag(jnp.arange(16)[None], 2))[0].reshape(2, length)
    for queries in range(2):
        for keys in range(2):
            for piece, moved in piece_masks(mask, cut, queries, keys, length):
                part = jax.device_get(moved.array(length, 4))[0]
                assert (part == whole[np.ix_(row[queries], row[keys][piece])]).all()
