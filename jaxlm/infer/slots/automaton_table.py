"""The automata of the requests in slots: of their stop strings and their grammars."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.infer.rules.automata import Automata, Automaton, StateTable
from jaxlm.infer.rules.stop_strings import stop_automaton
from jaxlm.infer.slots.slot_request import Request


class AutomatonTable:
    """Their table, on the host and on the devices."""

    def __init__(self, vocab_size: int, token_bytes: tuple[bytes, ...] | None):
        """Begins with an empty table, which takes no memory."""
        self._vocab_size, self._token_bytes = vocab_size, token_bytes
        self._automata = Automata(vocab_size)
        self._copied: Any = None
        self.on_device: StateTable
        self._copy()

    @property
    def size(self) -> int:
        """States of the table."""
        return len(self._automata.table)

    def size_with(self, request: Request) -> int:
        """Returns how many states the table would have with those of a request.

        Raises:
          ValueError: for stop strings that are too long.
          NoRoom: as `Automata.hold`.
        """
        return self._automata.size_with(self._of(request))

    def hold(self, request: Request) -> dict[Any, int]:
        """Adds those of a request; returns the first state of each.

        Raises:
          NoRoom: as `Automata.hold`.
        """
        held = self._automata.hold(self._of(request))
        if self._copied is not self._automata.table:
            self._copy()
        return held

    def release(self, held: dict[Any, int]) -> None:
        """Takes back one `hold`."""
        self._automata.release(held)

    def _copy(self) -> None:
        self._copied = self._automata.table
        self.on_device = _on_device(self._copied, self._automata.needs)

    def empty(self, size: int) -> StateTable:
        """Returns a table of `size` states, for a program to be compiled."""
        states = np.zeros((size, self._vocab_size), np.int16)
        return _on_device(states, np.zeros(size, np.int16))

    def _of(self, request: Request) -> dict[Any, Automaton]:
        automata: dict[Any, Automaton] = {}
        if strings := request.sample.stop_strings:
            assert self._token_bytes is not None
            automata[strings] = stop_automaton(
                strings, self._token_bytes, self._vocab_size
            )
        if request.grammar is not None:
            automata[id(request.grammar)] = request.grammar
        return automata


def _on_device(states: np.ndarray, needs: np.ndarray) -> StateTable:
    return StateTable(jnp.asarray(states), jnp.asarray(needs))
