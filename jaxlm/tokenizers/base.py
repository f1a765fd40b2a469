"""The tokenizer interface, and the decoding of ids, all at once or one at a time."""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from jaxlm.tokenizers.special_tokens import SpecialTokens, TokenizerSettings

TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1


class Piece(NamedTuple):
    """A token and its part of the text."""

    id: int
    """Token id."""
    start: int
    """Offset of its first UTF-8 byte in the text."""
    end: int
    """Offset after its last byte."""


class Tokenizer(ABC):
    """Converts text to token ids and back."""

    kind: str
    """Name of the kind, in saved files and messages."""
    vocab_size: int
    """Number of ids; each id is in [0, vocab_size)."""
    bos_id: int | None = None
    """Id of the token that begins a text, or None."""
    eos_id: int | None = None
    """Id of the token that ends a document, or None."""
    pad_id: int | None = None
    """Id of the token that pads rows, or None."""
    fingerprint: str
    """SHA-256 (hex) of kind and contents; equal ones give equal ids for every text."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end generation: `eos_id` and those that the model's files add."""
    adds_bos: bool = False
    """Whether the model expects `bos_id` before a text (`encode` never adds it)."""
    chat_template: str | None = None
    """Jinja source that formats a conversation, or None."""
    leading_spaces: Literal["keep", "drop one", "drop token", "drop all"] = "keep"
    """Which spaces decoding drops at the start: none, one, those of the first token
    with text, or those of all tokens before the first letter."""
    space_ids: Collection[int] = ()
    """Ids of the pieces that begin with such a space."""
    special_ids: Mapping[str, int] = MappingProxyType({})
    """Text of each special token -> id; only for trusted code: `encode` never uses
    them."""
    token_bytes: Sequence[bytes]
    """UTF-8 bytes that each id adds to a text; b"" for special tokens."""
    _specials = SpecialTokens({})

    @property
    def named_ids(self) -> dict[str, int]:
        """Ids of the bos, eos and pad tokens, by these names, if there are any."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        return {name: i for name, i in ids.items() if i is not None}

    @abstractmethod
    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Encodes a text; text never becomes a special token.

        Raises:
          ValueError: for a lone surrogate, or a character that the vocabulary lacks.
        """

    def encode_prompt(self, text: str) -> Int32[np.ndarray, "n"]:
        """Encodes a text to continue, after a bos token where the model expects one.

        An empty text becomes the bos token, if there is one.

        Raises:
          ValueError: as `encode` does.
        """
        ids = self.encode(text)
        if self.bos_id is None or not (self.adds_bos or not len(ids)):
            return ids
        return np.array([self.bos_id, *ids], np.int32)

    def encode_trusted(self, text: str, barrier: str) -> Int32[np.ndarray, "n"]:
        """Encodes a text formatted by a chat template, with its special tokens.

        `barrier` is a character that separates what must stay text: no special token is
        matched across it, and it leaves no trace in the ids.
        """
        check_text(text)
        ids: list[int] = []
        for at, part in self._specials.split(text):
            if isinstance(part, str):
                ids += self._encode_part(part.replace(barrier, ""), at == 0)
            else:
                ids.append(part)
        return np.asarray(ids, np.int32)

    def split_special(self, text: str) -> list[int | str]:
        """Returns the ids of special tokens in a trusted text, and the text beside."""
        return [part for _, part in self._specials.split(text)]

    def first_special(self, text: str) -> str | None:
        """Returns the first special token that a text spells out, or None.

        `encode` takes its characters for text.
        """
        return self._specials.first_in(text)

    def _encode_part(self, part: str, at_start: bool) -> Sequence[int]:
        """Encodes text between special tokens; `at_start`: it begins the whole text."""
        return self.encode(part).tolist()

    def decode(self, ids: Integer[np.ndarray, "n"] | Sequence[int]) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: for an id outside the vocabulary, or numbers that are no integers.
        """
        given = np.asarray(ids)
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"ids are integers, not {given.dtype} of shape {given.shape}: for "
                "logits, take their argmax(-1)"
            )
        array = given.astype(np.int64).reshape(-1)
        check_ids(array, self.vocab_size)
        table, rest = self.token_bytes, array.tolist()
        stream, head = TextStream(self), ""
        if self.leading_spaces != "keep":
            # Only the leading spaces depend on earlier tokens: decode them one by one.
            used = 0
            while used < len(rest) and stream._at_start:
                head += stream.feed(rest[used])
                used += 1
            rest = rest[used:]
        data = b"".join([table[i] for i in rest])
        return head + stream._utf8.decode(data, final=True)

    def pieces(self, text: str) -> list[Piece]:
        """Returns the ids of `encode(text)` with their byte ranges in the text.

        Where the model changes text (normalization, an added space), a piece may be
        empty or cover more bytes than its own.
        """
        ids = self.encode(text).tolist()
        return tile_bytes(ids, [len(self.token_bytes[i]) for i in ids])

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the files for `read_saved_tokenizer` into an existing folder."""

    def _write_description(self, folder: Path, **values: Any) -> None:
        """Writes tokenizer.json: kind, version, fingerprint and values of the kind."""
        values |= {"kind": self.kind, "version": FORMAT_VERSION}
        values["fingerprint"] = self.fingerprint
        text = json.dumps(values, indent=1, sort_keys=True)
        (Path(folder) / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")

    def _take(self, settings: TokenizerSettings) -> None:
        """Checks the settings of a model's files, and sets the attributes they name."""
        settings.check(self.vocab_size)
        self.settings = settings
        for name, value in vars(settings).items():
            setattr(self, name, value)


class TextStream:
    """Decodes ids one at a time, without ever showing part of a character.

    The concatenated results of `feed` and `finish` equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.leading_spaces != "keep"

    def feed(self, token_id: int) -> str:
        """Returns the text completed by this id, "" while a character lacks bytes.

        Raises:
          ValueError: for an id outside the vocabulary.
        """
        return self._utf8.decode(self.next_bytes(token_id))

    def next_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that this id adds; for callers that decode by themselves.

        Raises:
          ValueError: for an id outside the vocabulary.
        """
        if not 0 <= token_id < self._tokenizer.vocab_size:
            check_ids(np.asarray([token_id], np.int64), self._tokenizer.vocab_size)
        data = self._tokenizer.token_bytes[token_id]
        if self._at_start and data:
            data = self._drop_space(token_id, data)
        return data

    def _drop_space(self, token_id: int, data: bytes) -> bytes:
        if token_id not in self._tokenizer.space_ids:
            self._at_start = False
            return data
        if self._tokenizer.leading_spaces == "drop token":
            self._at_start = False
            return data.lstrip(b" ")
        rest = data.removeprefix(b" ")
        self._at_start = self._tokenizer.leading_spaces == "drop all" and not rest
        return rest

    def finish(self) -> str:
        """Returns what is left: U+FFFD for the bytes of an unfinished character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def check_ids(ids: Integer[np.ndarray, "n"], vocab_size: int) -> None:
    """Raises ValueError for the first id that is not in [0, vocab_size)."""
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        raise ValueError(
            f"token id {ids[bad[0]]} at index {bad[0]} is outside the vocabulary of "
            f"{vocab_size} tokens: it comes from another tokenizer"
        )


def check_text(text: str) -> None:
    """Raises ValueError for a lone surrogate, which no UTF-8 text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}): decode the text with errors='replace'"
        ) from None


def fingerprint_of(kind: str, contents: bytes) -> str:
    """SHA-256 (hex) of a tokenizer's kind and contents."""
    return hashlib.sha256(kind.encode() + b"\0" + contents).hexdigest()


def tile_bytes(ids: Iterable[int], lengths: Iterable[int], at: int = 0) -> list[Piece]:
    """Makes adjacent pieces from their lengths in bytes; the first begins at `at`."""
    pieces = []
    for token_id, length in zip(ids, lengths, strict=True):
        pieces.append(Piece(token_id, at, at + length))
        at += length
    return pieces
