"""Automata that were made before, for requests that ask for them again."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from jaxlm.infer.rules.automata import Automaton


class AutomatonCache:
    """Keeps the automata that were used last. Threads may share it."""

    def __init__(self, max_bytes: int):
        """Keeps tables of `max_bytes` together, and the newest whatever its size."""
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._kept: OrderedDict[Hashable, Automaton] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Automaton]) -> Automaton:
        """Returns the automaton of a key, which is made if it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            # Another thread may have been faster: requests share one object.
            if key not in self._kept:
                self._kept[key] = made
                self._num_bytes += _num_bytes(made)
            made = self._kept[key]
            while self._num_bytes > self._max_bytes and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._num_bytes -= _num_bytes(oldest)
            return made


def _num_bytes(automaton: Automaton) -> int:
    return automaton.transitions.nbytes + automaton.needs.nbytes
