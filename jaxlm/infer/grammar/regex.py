r"""Regular expressions, in Python's syntax, as automata.

What no finite automaton can do (looking around, references to groups) is refused, and
so are flags but (?s) and (?x). What is written matches with re.ASCII and without it:
\d, \w, \s, \D and \W are ASCII characters, \S all but Unicode's spaces.
"""

import re
from re import _constants as codes  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from jaxlm.infer.grammar.byte_automaton import (
    LAST_CHARACTER,
    Part,
    Ranges,
    characters,
    choice,
    complement,
    repeat,
    sequence,
    text,
)

_DIGITS = [(48, 57)]
_WORD = [*_DIGITS, (65, 90), (95, 95), (97, 122)]
_SPACES = [(9, 13), (32, 32)]
_BEYOND_ASCII = [(128, LAST_CHARACTER)]
# With those beyond ASCII.
_ALL_SPACES = [
    *(*_SPACES, (28, 31), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680)),
    *((0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F)),
    (0x3000, 0x3000),
]
# Characters that are in a category with re.ASCII and without, and in one of the two: a
# text that is written matches in both.
_CATEGORIES = {
    codes.CATEGORY_DIGIT: (_DIGITS, [*_DIGITS, *_BEYOND_ASCII]),
    codes.CATEGORY_WORD: (_WORD, [*_WORD, *_BEYOND_ASCII]),
    codes.CATEGORY_SPACE: (_SPACES, _ALL_SPACES),
    codes.CATEGORY_NOT_DIGIT: (
        complement([*_DIGITS, *_BEYOND_ASCII]),
        complement(_DIGITS),
    ),
    codes.CATEGORY_NOT_WORD: (complement([*_WORD, *_BEYOND_ASCII]), complement(_WORD)),
    codes.CATEGORY_NOT_SPACE: (complement(_ALL_SPACES), complement(_SPACES)),
}
_STARTS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING)
_ENDS = (codes.AT_END, codes.AT_END_STRING)
_REFUSED = {
    codes.ASSERT: "looks ahead or back",
    codes.ASSERT_NOT: "looks ahead or back",
    codes.AT: r"has ^, $ or \b inside",
    codes.GROUPREF: "refers to a group",
    codes.GROUPREF_EXISTS: "refers to a group",
    codes.ATOMIC_GROUP: "has an atomic group",
    codes.POSSESSIVE_REPEAT: "has a possessive repetition",
}
# How JSON writes what cannot stand in a string as it is.
_SHORT_ESCAPES = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"}
_ESCAPES = {34: '\\"', 92: "\\\\"} | {
    i: _SHORT_ESCAPES.get(i, f"\\u{i:04x}") for i in range(32)
}


def regex(pattern: str, *, in_json: bool = False, whole: bool = True) -> Part:
    """Returns what a regular expression matches.

    Args:
      pattern: Python's syntax.
      in_json: the text stands in a JSON string, with its escapes.
      whole: the pattern matches all of the text; otherwise any part of it, unless it
        has ^ or $.

    Raises:
      ValueError: if it is wrong, or needs more than a finite automaton; one line that
        begins with "the pattern".
    """
    try:
        parsed = parser.parse(pattern, re.ASCII)
        flags = re.RegexFlag(parsed.state.flags) & ~(re.ASCII | re.VERBOSE)
        if flags & ~re.DOTALL:
            raise ValueError("the pattern has a flag: only (?s) and (?x) are known")
        items = list(parsed)
        starts, ends = whole, whole
        while items and items[0] in [(codes.AT, at) for at in _STARTS]:
            starts, items = True, items[1:]
        while items and items[-1] in [(codes.AT, at) for at in _ENDS]:
            ends, items = True, items[:-1]
        compiler = _Compiler(in_json, bool(flags & re.DOTALL))
        part = compiler.sequence(items)
        anything = repeat(compiler.one([(0, LAST_CHARACTER)]), 0, None)
        before, after = (() if fixed else (anything,) for fixed in (starts, ends))
        return sequence(*before, part, *after)
    except re.error as error:
        raise ValueError(f"the pattern is wrong: {error}") from None
    except (RecursionError, OverflowError):
        raise ValueError("the pattern is nested or repeated too often") from None


def one_character(ranges: Ranges, *, in_json: bool) -> Part:
    """Returns one character of these ranges; in a JSON string perhaps escaped."""
    if not in_json:
        return characters(ranges)
    escaped = [
        text(_ESCAPES[i])
        for i in _ESCAPES
        if any(low <= i <= high for low, high in ranges)
    ]
    plain = complement([*complement(ranges), *((i, i) for i in _ESCAPES)])
    return choice(characters(plain), *escaped)


class _Compiler:
    def __init__(self, in_json: bool, dot_is_all: bool):
        self._in_json = in_json
        self._dot = [(0, LAST_CHARACTER)] if dot_is_all else complement([(10, 10)])

    def one(self, ranges: Ranges) -> Part:
        return one_character(ranges, in_json=self._in_json)

    def sequence(self, items: Any) -> Part:
        return sequence(*(self._item(code, value) for code, value in items))

    def _item(self, code: Any, value: Any) -> Part:
        if code in _REFUSED:
            raise ValueError(
                f"the pattern {_REFUSED[code]}, which no finite automaton can do"
            )
        if code is codes.LITERAL:
            return self.one([(value, value)])
        if code is codes.NOT_LITERAL:
            return self.one(complement([(value, value)]))
        if code is codes.ANY:
            return self.one(self._dot)
        if code is codes.IN:
            return self.one(_class_ranges(value))
        if code is codes.BRANCH:
            return choice(*map(self.sequence, value[1]))
        if code is codes.SUBPATTERN:
            _, added, removed, items = value
            if added or removed:
                raise ValueError("the pattern has a flag inside: it cannot")
            return self.sequence(items)
        assert code in (codes.MAX_REPEAT, codes.MIN_REPEAT), code
        least, most, items = value
        unbounded = most is codes.MAXREPEAT
        return repeat(self.sequence(items), least, None if unbounded else most)


def _class_ranges(items: Any) -> Ranges:
    """The code points of [...]."""
    ranges, negated = [], items[0][0] is codes.NEGATE
    for code, value in items[negated:]:
        if code is codes.LITERAL:
            ranges.append((value, value))
        elif code is codes.RANGE:
            ranges.append(value)
        else:
            ranges += _CATEGORIES[value][negated]
    return complement(ranges) if negated else ranges
