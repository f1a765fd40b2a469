"""Stop strings: in the decoding scan as an automaton over tokens, on the host as text.

A stop string may begin and end inside a token. Each state of the automaton is a part of
a stop string that the text ends with; each token leads from state to state by its
bytes, so finding a stop string takes one lookup a token (`automata.py`).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16

from jaxlm.infer.rules.automata import ENDS, Automaton
from jaxlm.infer.rules.automaton_cache import AutomatonCache

_KEPT = AutomatonCache(512 << 20)


def stop_automaton(
    strings: tuple[str, ...], token_bytes: tuple[bytes, ...], vocab_size: int
) -> Automaton:
    """Returns the automaton that ends a text with the first of these strings.

    Args:
      strings: at least one.
      token_bytes: UTF-8 bytes of each id; ids beyond have none.
    """
    key = strings, token_bytes, vocab_size
    return _KEPT.get(key, lambda: _stop_automaton(*key))


def _stop_automaton(
    strings: tuple[str, ...], token_bytes: tuple[bytes, ...], vocab_size: int
) -> Automaton:
    patterns = [text.encode() for text in strings]
    if sum(map(len, patterns)) >= np.iinfo(np.int16).max:
        raise ValueError("stop_strings: together they are too long")
    by_byte = _byte_transitions(patterns)
    states = np.broadcast_to(
        np.arange(len(by_byte), dtype=np.int16)[:, None], (len(by_byte), vocab_size)
    ).copy()
    lengths = np.array([len(data) for data in token_bytes])
    for i in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > i)
        column = np.array([token_bytes[token][i] for token in longer])
        before = states[:, longer]
        after = by_byte[np.maximum(before, 0), column]
        states[:, longer] = np.where(before == ENDS, ENDS, after)
    return Automaton(states, np.zeros(len(states), np.int16))


def _byte_transitions(patterns: list[bytes]) -> Int16[np.ndarray, "states 256"]:
    """The automaton of Aho and Corasick (1975); `ENDS` after a pattern."""
    parts = {b""} | {pattern[:n] for pattern in patterns for n in range(len(pattern))}
    state_of = {part: i for i, part in enumerate(sorted(parts, key=len))}
    next_bytes: dict[bytes, set[int]] = {part: set() for part in parts}
    for pattern in patterns:
        for n, byte in enumerate(pattern):
            next_bytes[pattern[:n]].add(byte)
    whole = set(patterns)
    table = np.zeros((len(parts), 256), np.int16)
    # Of each state, that of the longest shorter suffix of its part.
    suffixes = np.zeros(len(parts), np.int16)
    for part, state in state_of.items():
        if part:
            shorter = suffixes[state_of[part[:-1]]]
            suffix = table[shorter, part[-1]] if len(part) > 1 else 0
            if shorter == ENDS or suffix == ENDS:
                # A pattern ends inside of this part, which no text reaches.
                suffixes[state], table[state] = ENDS, ENDS
                continue
            suffixes[state], table[state] = suffix, table[suffix]
        for byte in next_bytes[part]:
            longer = part + bytes([byte])
            if longer in whole:
                table[state, byte] = ENDS
            elif table[state, byte] != ENDS:
                table[state, byte] = state_of[longer]
    return table


class StopText:
    """Cuts a text before the first stop string, as the text comes."""

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._held = ""
        self.is_stopped = False
        """Whether a stop string has come."""

    def feed(self, text: str) -> str:
        """Returns what of the text so far is certain to come before a stop string."""
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [at for s in self._strings if (at := text.find(s)) >= 0]
        self.is_stopped = bool(found)
        if found:
            self._held = ""
            return text[: min(found)]
        longest = max(map(len, self._strings), default=0)
        starts = range(max(0, len(text) - longest + 1), len(text))
        held = (i for i in starts if any(s.startswith(text[i:]) for s in self._strings))
        cut = next(held, len(text))
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """Returns what was held back as the possible start of a stop string."""
        held, self._held = self._held, ""
        return held


def until_stop(text: str, strings: Sequence[str]) -> str:
    """Returns the text before the first stop string."""
    stop = StopText(strings)
    return stop.feed(text) + stop.finish()
