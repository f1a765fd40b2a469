"""The order of training rows: a pure function of (seed, index), with random access."""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from jaxlm.data.packing import mix_bits

# Shares of a mixture become whole numbers with about this sum, at least 1 each.
SHARE_UNITS = 1_000_000
# Up to this many rows, the order of an epoch is a table (built in 1 ms, once an epoch).
# Grain's shuffle permutes at least 2**16 numbers and repeats until the result is a row:
# 3 us for each of 16,384 rows or more, but 30 us for 1,000 and 5 ms for 10 (measured).
TABLE_ROWS = 1 << 14
# The number that Grain's own `MapDataset.shuffle` uses.
SHUFFLE_ROUNDS = 4


class RowOrder:
    """An endless sequence of rows (source, epoch, row) with random access.

    Sources are interleaved in fixed shares, as evenly as whole rows allow. Each epoch
    of a source has every row once, newly shuffled.
    """

    def __init__(self, num_rows: Sequence[int], shares: Sequence[float], seed: int):
        """Takes rows per epoch and share of each source (share 0 leaves it out)."""
        self._num_rows = np.asarray(num_rows, np.int64)
        self._seed = seed
        self.units = share_units(shares)

    def rows(
        self, index: Int64[np.ndarray, "B"]
    ) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
        """Returns source, epoch and row within the epoch for each index."""
        source, key = interleave(index, self.units)
        num_rows = self._num_rows[source]
        epoch, within = np.divmod(key, num_rows)
        arguments = np.stack([source, epoch, num_rows, within], axis=1).tolist()
        row = [_shuffled(self._seed, *values) for values in arguments]
        return source, epoch, np.asarray(row, np.int64)


def _shuffled(seed: int, source: int, epoch: int, num_rows: int, index: int) -> int:
    if num_rows <= TABLE_ROWS:
        return _table(seed, source, epoch, num_rows)[index]
    # Imported here: it takes 0.6 s, and small texts do not need it.
    from grain.experimental import index_shuffle

    return index_shuffle(
        index, num_rows - 1, _epoch_seed(seed, source, epoch), SHUFFLE_ROUNDS
    )


@lru_cache(maxsize=64)
def _epoch_seed(seed: int, source: int, epoch: int) -> int:
    # `MapDataset.shuffle` uses seed + epoch, so runs with seeds 0 and 1 would share all
    # epochs but one. A hash of all three avoids this.
    return int(mix_bits(seed, source, epoch)) % 2**32


@lru_cache(maxsize=64)
def _table(seed: int, source: int, epoch: int, num_rows: int) -> list[int]:
    keys = mix_bits(seed, source, epoch, np.arange(num_rows))
    return np.argsort(keys, kind="stable").tolist()


def share_units(shares: Sequence[float]) -> list[int]:
    """Converts shares to whole numbers in proportion to them."""
    total = sum(map(Fraction, shares))
    units = [round(Fraction(s) / total * SHARE_UNITS) for s in shares]
    return [max(u, 1) if s else 0 for u, s in zip(units, shares, strict=True)]


def interleave(
    index: Int64[np.ndarray, "B"], units: Sequence[int]
) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
    """Returns the source of each index of a mixture, and the index within that source.

    The scheme of `grain.MapDataset.mix`, for whole arrays: of the first k indices, the
    first source has its share of k, rounded up; the others divide the rest likewise.
    Grain itself rounds shares to 1% and takes 35 us for each element (measured).

    Args:
      index: at most 2**43, so that products fit into 64 bits.
      units: whole numbers in proportion to the shares.
    """
    source = np.zeros_like(index)
    key = np.zeros_like(index)
    open_ = np.ones(index.shape, np.bool_)
    now, then, remaining = index, index + 1, sum(units)
    for number, unit in enumerate(units):
        rest_now = now * (remaining - unit) // remaining
        rest_then = then * (remaining - unit) // remaining
        here = open_ & (then - rest_then != now - rest_now)
        source[here] = number
        key[here] = (now - rest_now)[here]
        open_ &= ~here
        remaining -= unit
        now, then = rest_now, rest_then
        if not remaining:
            break
    return source, key
