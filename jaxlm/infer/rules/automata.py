"""Automata over tokens, which the decoding scan follows: stop strings and grammars.

The automata of all rows of a batch are regions of one table, so one lookup a token
serves any number of rows. The table has a power of two of states, or as many as
int16 counts: others of the same size compile nothing.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int16

Transitions = Int16[np.ndarray, "states V"]


class Automaton(NamedTuple):
    """What the text of a row follows, from state 0 on."""

    transitions: Transitions
    """The state after each state and token, `FORBIDDEN` or `ENDS`."""
    needs: Int16[np.ndarray, " states"]
    """The fewest tokens after which a text may end, from each state; -1: it cannot."""


class StateTable(NamedTuple):
    """The automata of all rows, on the device."""

    # `Any`: see `jaxlm/types.py` on leaves.
    next_states: Any
    """[states, V] int16; negative where a token may not follow."""
    needs: Any
    """[states] int16, as `Automaton.needs`."""


# In an automaton: the token may not follow, or the text ends with it.
FORBIDDEN, ENDS = -1, -2
# In the table: the state of a text that has ended, and of one without an automaton.
ENDED, FREE = 0, 1
_SMALLEST_TABLE = 16


class NoRoom(ValueError):
    """The automata that are in use leave no room in the table."""


@dataclass
class _Region:
    start: int
    automaton: Automaton
    """Kept, so that no other automaton has its `id`."""
    users: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.automaton.needs)


class Automata:
    """The automata of the rows of a batch, in one table."""

    def __init__(self, vocab_size: int):
        """Begins with a table of `FREE` states only, which takes no memory."""
        self.table: Transitions = self._free(_SMALLEST_TABLE, vocab_size)
        """[states, V]; negative where a token may not follow. Replaced, not changed."""
        self.needs: Int16[np.ndarray, " states"] = np.zeros(_SMALLEST_TABLE, np.int16)
        """[states]; replaced with the table."""
        self._regions: dict[Hashable, _Region] = {}

    def hold(self, automata: Mapping[Hashable, Automaton]) -> dict[Hashable, int]:
        """Adds automata unless they are there, until `release`.

        Args:
          automata: each under a name, which stands for it until it is released.

        Returns:
          The first state of each in the table.

        Raises:
          NoRoom: if the table would have more states than int16 counts.
        """
        places, size = self._places(automata)
        added = {name: automata[name] for name in places}
        if added:
            table = self._free(size, self.table.shape[1]).copy()
            table[: len(self.table)] = self.table
            needs = np.zeros(size, np.int16)
            needs[: len(self.needs)] = self.needs
            for name, start in places.items():
                rows = added[name].transitions
                inside = np.where(rows == FORBIDDEN, FORBIDDEN, rows + start)
                inside[rows == ENDS] = ENDED
                table[start : start + len(rows)] = inside
                needs[start : start + len(rows)] = added[name].needs
                self._regions[name] = _Region(start, added[name])
            self.table, self.needs = table, needs
        for name in automata:
            self._regions[name].users += 1
        return {name: self._regions[name].start for name in automata}

    def release(self, names: Iterable[Hashable]) -> None:
        """Takes back one `hold` of these automata; they stay until room is needed."""
        for name in names:
            self._regions[name].users -= 1

    def size_with(self, automata: Mapping[Hashable, Automaton]) -> int:
        """Returns how many states the table would have with these too.

        Raises:
          NoRoom: as `hold`.
        """
        return self._places(automata)[1]

    def _places(
        self, automata: Mapping[Hashable, Automaton]
    ) -> tuple[dict[Hashable, int], int]:
        """Finds room for those that are new, and the size of the table with them.

        It is after what is there, or else where nothing is used.
        """
        sizes = {n: len(a.needs) for n, a in automata.items() if n not in self._regions}
        end = max((r.end for r in self._regions.values()), default=FREE + 1)
        if end + sum(sizes.values()) > len(self.table):
            self._regions = {
                name: region
                for name, region in self._regions.items()
                if region.users or name in automata
            }
        taken = [(r.start, r.end) for r in self._regions.values()]
        places, table_size = {}, len(self.table)
        for name, size in sizes.items():
            at = FREE + 1
            for start, end in sorted(taken):
                if at + size <= start:
                    break
                at = max(at, end)
            if at + size > np.iinfo(np.int16).max:
                raise NoRoom("stop strings, grammars: together they are too long")
            places[name] = at
            taken.append((at, at + size))
            while at + size > table_size:
                # The size itself must be an int16, too.
                table_size = min(2 * table_size, np.iinfo(np.int16).max)
        return places, table_size

    @staticmethod
    def _free(size: int, vocab_size: int) -> Transitions:
        """Returns a table in which every token leads back to the same state."""
        states = np.arange(size, dtype=np.int16)[:, None]
        return np.broadcast_to(states, (size, vocab_size))
