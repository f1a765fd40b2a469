"""Automata over tokens, which the decoding scan follows: stop strings and grammars.

An automaton is a table of int16: the state after each state and token, from state 0 on.
Those of all rows of a batch are regions of one table, so one lookup a token serves any
number of rows. The table has a power of two of states: others of the same size compile
nothing.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int16

Transitions = Int16[np.ndarray, "states V"]

# In an automaton: the token may not follow, or the text ends with it.
FORBIDDEN, ENDS = -1, -2
# In the table: the state of a text that has ended, and of one without an automaton.
ENDED, FREE = 0, 1
_SMALLEST_TABLE = 16


@dataclass
class _Region:
    start: int
    transitions: Transitions
    """Kept, so that no other automaton has its `id`."""
    users: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.transitions)


class Automata:
    """The automata of the rows of a batch, in one table."""

    def __init__(self, vocab_size: int):
        """Begins with a table of `FREE` states only, which takes no memory."""
        self.table: Transitions = self._free(_SMALLEST_TABLE, vocab_size)
        """[states, V]; negative where a token may not follow. Replaced, not changed."""
        self._regions: dict[Hashable, _Region] = {}

    def hold(self, automata: Mapping[Hashable, Transitions]) -> dict[Hashable, int]:
        """Adds automata unless they are there, until `release`.

        Args:
          automata: each under a name, which stands for it until it is released.

        Returns:
          The first state of each in the table.

        Raises:
          ValueError: if the table would have more states than int16 counts.
        """
        added = {n: rows for n, rows in automata.items() if n not in self._regions}
        places = self._places({name: len(rows) for name, rows in added.items()})
        size = len(self.table)
        while any(start + len(added[name]) > size for name, start in places.items()):
            size *= 2
        if added:
            table = self._free(size, self.table.shape[1]).copy()
            table[: len(self.table)] = self.table
            for name, start in places.items():
                rows = added[name]
                inside = np.where(rows == FORBIDDEN, FORBIDDEN, rows + start)
                inside[rows == ENDS] = ENDED
                table[start : start + len(rows)] = inside
                self._regions[name] = _Region(start, rows)
            self.table = table
        for name in automata:
            self._regions[name].users += 1
        return {name: self._regions[name].start for name in automata}

    def release(self, names: Iterable[Hashable]) -> None:
        """Takes back one `hold` of these automata; they stay until room is needed."""
        for name in names:
            self._regions[name].users -= 1

    def _places(self, sizes: Mapping[Hashable, int]) -> dict[Hashable, int]:
        """Finds room: after what is there, or else where nothing is used."""
        end = max((r.end for r in self._regions.values()), default=FREE + 1)
        if end + sum(sizes.values()) > len(self.table):
            used = {n: region for n, region in self._regions.items() if region.users}
            self._regions = used
        taken = [(r.start, r.end) for r in self._regions.values()]
        places = {}
        for name, size in sizes.items():
            at = FREE + 1
            for start, end in sorted(taken):
                if at + size <= start:
                    break
                at = max(at, end)
            if at + size > np.iinfo(np.int16).max:
                raise ValueError("stop strings, grammars: together they are too long")
            places[name] = at
            taken.append((at, at + size))
        return places

    @staticmethod
    def _free(size: int, vocab_size: int) -> Transitions:
        """Returns a table in which every token leads back to the same state."""
        states = np.arange(size, dtype=np.int16)[:, None]
        return np.broadcast_to(states, (size, vocab_size))
