"""Special tokens: their settings in a model's files, and matching in trusted text."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# White space as in the library `tokenizers` (Unicode's White_Space); Python's includes
# four more control characters.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACES_AFTER = re.compile(f"[{_SPACES}]*")
_SPACES_BEFORE = re.compile(f"[{_SPACES}]*\\Z")


@dataclass(frozen=True)
class TokenizerSettings:
    """How a model uses its tokenizer, according to the files next to it."""

    bos_id: int | None = None
    """Id of the token that begins a text."""
    eos_id: int | None = None
    """Id of the token that ends a document."""
    pad_id: int | None = None
    """Id of the token that pads rows."""
    adds_bos: bool = False
    """Whether the model expects `bos_id` before a text."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end generation, including `eos_id` if there is one."""
    chat_template: str | None = None
    """Jinja source that formats a conversation."""

    def __post_init__(self):
        if self.eos_id is not None and self.eos_id not in self.stop_ids:
            object.__setattr__(self, "stop_ids", (self.eos_id, *self.stop_ids))
        if self.adds_bos and self.bos_id is None:
            raise ValueError("the tokenizer adds a bos token, but names none")

    @property
    def ids(self) -> list[Any]:
        """The settings that change token ids, for the fingerprint."""
        return [self.bos_id, self.eos_id, self.pad_id, self.adds_bos]

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for an id that is not in [0, vocab_size)."""
        named = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        named |= {f"stop ({i})": stop for i, stop in enumerate(self.stop_ids)}
        for name, token_id in named.items():
            if token_id is not None and not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"the id of the {name} token is {token_id}, outside the vocabulary "
                    f"of {vocab_size} tokens"
                )


@dataclass(frozen=True)
class Special:
    """A special token, and its effect on the text around it."""

    id: int
    strips_left: bool = False
    """Absorbs white space before it."""
    strips_right: bool = False
    """Absorbs white space after it."""
    whole_word: bool = False
    """Matches only as a word: not next to a letter, digit or underscore."""


class SpecialTokens:
    """Finds special tokens in a text: the leftmost first, then the longest."""

    def __init__(self, tokens: Mapping[str, Special]):
        self.tokens = {text: tokens[text] for text in tokens if text}
        lengths: dict[str, set[int]] = {}
        for text in self.tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        # One pattern of all tokens would take seconds for 100,000 of them.
        self._lengths = {c: sorted(n, reverse=True) for c, n in lengths.items()}
        pattern = f"[{re.escape(''.join(lengths))}]"
        self._first = re.compile(pattern) if lengths else None

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Yields start and end of each token, which do not overlap."""
        at = 0
        while self._first and (first := self._first.search(text, at)):
            start = first.start()
            ends = (start + n for n in self._lengths[text[start]])
            at = next((e for e in ends if text[start:e] in self.tokens), start)
            if at > start:
                yield start, at
            else:
                at = start + 1

    def first_in(self, text: str) -> str | None:
        """Returns the first special token that a text spells out, or None."""
        return next((text[start:end] for start, end in self._found(text)), None)

    def split(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Yields (offset, id of a special token or the text between two of them)."""
        at = 0
        for start, end in self._found(text):
            special = self.tokens[text[start:end]]
            if start < at:
                continue  # The previous token absorbed these characters.
            if special.whole_word and _touches_a_word(text, start, end):
                continue
            if special.strips_left:
                before = _SPACES_BEFORE.search(text[at:start])
                assert before is not None  # It also matches the empty string.
                start = at + before.start()
            if special.strips_right:
                after = _SPACES_AFTER.match(text, end)
                assert after is not None
                end = after.end()
            if at < start:
                yield at, text[at:start]
            yield start, special.id
            at = end
        if at < len(text):
            yield at, text[at:]


def _touches_a_word(text: str, start: int, end: int) -> bool:
    beside = text[max(start - 1, 0) : start] + text[end : end + 1]
    return any(c.isalnum() or c == "_" for c in beside)
