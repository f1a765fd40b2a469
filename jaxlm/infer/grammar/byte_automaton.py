"""Automata over the UTF-8 bytes of a text, built from parts.

A part adds states to a nondeterministic automaton, from a given first state, and
returns its last one. `determinize` makes the table of the whole (Rabin and Scott 1959).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

MAX_STATES = 8192
_MAX_PARTS = 50_000
# Bounds of time, a second or two each: parts in all states together, and rows that are
# sorted to join states.
_MAX_WORK = 4_000_000
# Likewise: members of sets of parts that are joined, which takes less for each.
_MAX_JOINED = 40_000_000
LAST_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
DEAD = -1

Part = Callable[["Builder", int], int]
Ranges = list[tuple[int, int]]


class Builder:
    """A nondeterministic automaton that grows."""

    def __init__(self):
        self.free: list[list[int]] = [[]]
        """States that each state leads to without a byte."""
        self.moves: list[list[tuple[int, int, int]]] = [[]]
        """(first byte, last byte, state) of each state."""

    def new(self) -> int:
        """Adds a state."""
        if len(self.free) >= _MAX_PARTS:
            raise ValueError("it has too many repetitions: bound them lower")
        self.free.append([])
        self.moves.append([])
        return len(self.free) - 1


class ByteAutomaton(NamedTuple):
    """A deterministic automaton; state 0 is the first."""

    next_states: Int32[np.ndarray, "states 256"]
    """The state after each state and byte, or `DEAD`."""
    accepts: Bool[np.ndarray, " states"]
    """Whether the text may end in a state."""


def characters(ranges: Iterable[tuple[int, int]]) -> Part:
    """One character of these ranges of code points; surrogates are left out."""
    sequences = [s for low, high in _merged(ranges) for s in _utf8_ranges(low, high)]

    def add(builder: Builder, start: int) -> int:
        end = builder.new()
        # Sequences that end alike share states.
        tails: dict[tuple, int] = {(): end}
        for one in sequences:
            for i in range(len(one) - 1, 0, -1):
                if one[i:] not in tails:
                    tails[one[i:]] = builder.new()
                    move = (*one[i], tails[one[i + 1 :]])
                    builder.moves[tails[one[i:]]].append(move)
            builder.moves[start].append((*one[0], tails[one[1:]]))
        return end

    return add


def text(value: str) -> Part:
    """Exactly this text."""

    def add(builder: Builder, start: int) -> int:
        for byte in value.encode():
            end = builder.new()
            builder.moves[start].append((byte, byte, end))
            start = end
        return start

    return add


def sequence(*parts: Part) -> Part:
    """One part after the other."""

    def add(builder: Builder, start: int) -> int:
        for part in parts:
            start = part(builder, start)
        return start

    return add


def choice(*parts: Part) -> Part:
    """One of the parts; none of none."""

    def add(builder: Builder, start: int) -> int:
        end = builder.new()
        for part in parts:
            builder.free[part(builder, start)].append(end)
        return end

    return add


def repeat(part: Part, least: int, most: int | None) -> Part:
    """The part so many times; None: any number of times."""

    def add(builder: Builder, start: int) -> int:
        for _ in range(least):
            before, start = start, part(builder, start)
            if start == before:  # The part is the empty text.
                break
        if most is None:
            # A state of its own: the one before may begin other parts too.
            loop = builder.new()
            builder.free[start].append(loop)
            builder.free[part(builder, loop)].append(loop)
            return loop
        end = builder.new()
        builder.free[start].append(end)
        for _ in range(most - least):
            start = part(builder, start)
            builder.free[start].append(end)
        return end

    return add


def members(parts: list[tuple[bool, Part]], separator: Part) -> Part:
    """Parts in this order, with a separator between; those that are True must come."""

    def add(builder: Builder, start: int) -> int:
        # After no member, and after one at least.
        none: int | None = start
        some = builder.new()
        for must, part in parts:
            begin = builder.new()
            builder.free[separator(builder, some)].append(begin)
            if none is not None:
                builder.free[none].append(begin)
            after = builder.new()
            builder.free[part(builder, begin)].append(after)
            if must:
                none = None
            else:
                builder.free[some].append(after)
            some = after
        if none is not None:
            builder.free[none].append(some)
        return some

    return add


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The code points that are in none of the ranges."""
    left, at = [], 0
    for low, high in [*_merged(ranges), (LAST_CHARACTER + 1,) * 2]:
        if at < low:
            left.append((at, low - 1))
        at = high + 1
    return left


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged


def _utf8_ranges(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yields ranges of bytes that together encode exactly these code points."""
    # Where the number of bytes changes, and around the surrogates.
    for cut in (0x7F, 0x7FF, _SURROGATES[0] - 1, _SURROGATES[1], 0xFFFF):
        if low <= cut < high:
            yield from _utf8_ranges(low, cut)
            yield from _utf8_ranges(cut + 1, high)
            return
    if _SURROGATES[0] <= low <= _SURROGATES[1]:
        return
    size = len(chr(low).encode())
    for i in range(1, size):
        # The last i bytes must take all their values, or the others only one.
        ones = (1 << 6 * i) - 1
        if low & ~ones != high & ~ones:
            if low & ones:
                yield from _utf8_ranges(low, low | ones)
                yield from _utf8_ranges((low | ones) + 1, high)
                return
            if high & ones != ones:
                yield from _utf8_ranges(low, (high & ~ones) - 1)
                yield from _utf8_ranges(high & ~ones, high)
                return
    yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


def determinize(part: Part) -> ByteAutomaton:
    """Returns the automaton of a whole text.

    Raises:
      ValueError: if it has too many states.
    """
    builder = Builder()
    last = part(builder, 0)
    closures: dict[int, frozenset[int]] = {}
    work = joined = 0

    def check_work() -> None:
        if work > _MAX_WORK or joined > _MAX_JOINED:
            raise ValueError(
                "its repetitions can be matched in too many ways: bound them lower"
            )

    def closure(state: int) -> frozenset[int]:
        """States that do something and are reached without a byte."""
        nonlocal work
        if state not in closures:
            seen, left = {state}, [state]
            while left:
                new = [s for s in builder.free[left.pop()] if s not in seen]
                seen.update(new)
                left += new
            work += len(seen)
            check_work()
            closures[state] = frozenset(
                s for s in seen if builder.moves[s] or s == last
            )
        return closures[state]

    edges = {0, 256}
    for moves in builder.moves:
        for low, high, _ in moves:
            edges |= {low, high + 1}
    first_bytes = np.array(sorted(edges)[:-1])
    class_of = {int(byte): i for i, byte in enumerate(first_bytes)}
    class_of[256] = len(first_bytes)

    start = closure(0)
    numbers, order, rows = {start: 0}, [start], []
    for states in order:
        work += len(states)
        check_work()
        targets: list[set[int]] = [set() for _ in first_bytes]
        for state in states:
            for low, high, to in builder.moves[state]:
                for i in range(class_of[low], class_of[high + 1]):
                    targets[i].add(to)
        row = np.full(len(first_bytes), DEAD, np.int32)
        known: dict[frozenset[int], int] = {}
        for i, target in enumerate(targets):
            if not target:
                continue
            key = frozenset(target)
            if key not in known:
                parts = [closure(state) for state in key]
                joined += sum(map(len, parts))
                check_work()
                found = frozenset().union(*parts)
                if found not in numbers:
                    numbers[found] = len(numbers)
                    order.append(found)
                known[key] = numbers[found]
            row[i] = known[key]
        rows.append(row)
        if len(numbers) > MAX_STATES:
            raise ValueError(
                f"its automaton has more than {MAX_STATES:,} states: bound its "
                "repetitions lower"
            )
    accepts = np.array([last in states for states in order])
    by_class, accepts = _minimal(np.stack(rows), accepts)
    of_byte = np.searchsorted(first_bytes, np.arange(256), side="right") - 1
    return ByteAutomaton(by_class[:, of_byte], accepts)


def _minimal(
    table: np.ndarray, accepts: Bool[np.ndarray, " _"]
) -> tuple[np.ndarray, Bool[np.ndarray, " _"]]:
    """Joins states after which the same texts are left (Moore 1956).

    Where that takes long, as in a chain of thousands of states, none are joined.
    """
    labels, count = accepts.astype(np.int64), 0
    for _ in range(_MAX_WORK // len(table) + 1):
        # A dead end has a label of its own.
        after = np.append(labels, -1)[table]
        rows = np.column_stack([labels, after])
        _, first, labels = np.unique(
            rows, axis=0, return_index=True, return_inverse=True
        )
        labels = labels.reshape(-1)
        if len(first) == count:
            break
        count = len(first)
    else:
        return table, accepts
    # The first state stays the first.
    order = np.argsort(first)
    number = np.empty(count, np.int64)
    number[order] = np.arange(count)
    kept = first[order]
    return np.append(number[labels], DEAD)[table[kept]].astype(np.int32), accepts[kept]
