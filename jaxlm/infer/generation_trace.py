"""What taps have read while a text was generated: of its prompt and of its new tokens.

Index t along the tokens is the position t in the text, as for edits. The trace of a row
has no batch axis, since rows have different lengths.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model.recording import letter_sizes
from jaxlm.model.trace import absent_sites
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap, check_taps
from jaxlm.types import Trace


def check_generation_taps(config: ModelConfig, taps: Sequence[Tap]) -> None:
    """Checks taps of `generate`.

    Raises:
      ValueError: for taps that cannot be; with positions, since a row's length is not
        known before; or with a reducer over the tokens themselves.
    """
    length = config.context_length
    check_taps(taps, letter_sizes(config, 1, length, length), absent_sites(config))
    for tap in taps:
        if tap.positions is not None:
            raise ValueError(
                f"tap of {tap.site!r}: the trace of a generation has all tokens of a "
                "row: leave out positions=, and index it"
            )
        if tap.reduce and SITES[tap.site].shape.endswith(" T"):
            raise ValueError(f"tap of {tap.site!r}: its last axis are the tokens")


def row_of_chunk(taps: Sequence[Tap], trace: Trace, row: int, count: int) -> Trace:
    """Returns a row's first `count` tokens in the trace of one forward pass."""

    def of(tap: Tap, x: np.ndarray) -> np.ndarray:
        return _take(tap, x, row, leading=0)[_tokens(tap, np.s_[:count])]

    return _each(of, taps, trace)


def row_of_steps(taps: Sequence[Tap], trace: Trace, row: int, count: int) -> Trace:
    """Returns a row's first `count` tokens in the traces of decoding steps.

    Args:
      trace: with an axis of steps in front, each of one token.
    """

    def of(tap: Tap, x: np.ndarray) -> np.ndarray:
        x = _take(tap, x[:count], row, leading=1)
        axis = _token_axis(tap)
        return np.moveaxis(x.squeeze(axis + 1), 0, axis)

    return _each(of, taps, trace)


def joined(taps: Sequence[Tap], parts: Sequence[Trace]) -> Trace:
    """Returns the trace of a row from those of its tokens, in order."""

    def of(tap: Tap, *arrays: np.ndarray) -> np.ndarray:
        axis = _token_axis(tap)
        if SITES[tap.site].shape.endswith("S") and tap.reduce is None:
            # Each pass sees as many keys as its cache has room for.
            total = sum(x.shape[axis] for x in arrays)
            arrays = tuple(_as_long(x, total) for x in arrays)
        return np.concatenate(arrays, axis=axis)

    return _each(of, taps, *parts)


def _each(function: Any, taps: Sequence[Tap], *traces: Trace) -> Trace:
    return {
        tap.site: jax.tree.map(
            lambda *x, tap=tap: function(tap, *map(np.asarray, x)),
            *(trace[tap.site] for trace in traces),
        )
        for tap in taps
    }


def _take(tap: Tap, x: np.ndarray, row: int, leading: int) -> np.ndarray:
    """Returns a row of the batch, whose axis follows that of the layers."""
    return np.take(x, row, axis=leading + (not SITES[tap.site].outside_layers))


def _token_axis(tap: Tap) -> int:
    """Returns the axis of the tokens in a row's trace, which has no batch axis."""
    axis = SITES[tap.site].axis("T")
    assert axis is not None
    return axis - 1 + (not SITES[tap.site].outside_layers)


def _tokens(tap: Tap, index: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * _token_axis(tap), index)


def _as_long(x: np.ndarray, length: int) -> np.ndarray:
    """Cuts the last axis, or appends zeros."""
    missing = max(length - x.shape[-1], 0)
    widths = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
    return np.pad(x[..., :length], widths)
