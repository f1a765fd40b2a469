"""What a tokenizer is, and how token ids become text, at once or one at a time."""

import codecs
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION = 1


class Piece(NamedTuple):
    """A token and the part of the text that it stands for."""

    id: int
    """Token id."""
    start: int
    """Offset of its first UTF-8 byte in the text."""
    end: int
    """Offset after its last byte."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Equal fingerprints mean equal ids for every text."""

    kind: str
    """What saved files and messages call it."""
    vocab_size: int
    """Number of ids; each id is in [0, vocab_size)."""
    bos_id: int | None
    """Id that begins a text, or None."""
    eos_id: int | None
    """Id that ends a document, or None."""
    pad_id: int | None
    """Id that pads rows, or None."""
    fingerprint: str
    """SHA-256 (hex) of the kind and contents."""
    stop_ids: tuple[int, ...]
    """Ids after which generation stops: `eos_id` and what the model's files add."""
    adds_bos: bool
    """Whether the model expects `bos_id` before a text (`encode` never adds it)."""
    chat_template: str | None
    """Jinja source that lays out a conversation, or None."""
    leading_spaces: Literal["keep", "drop one", "drop token", "drop all"]
    """What decoding does with spaces before the first text: drops none, one, those of
    the first token that has text, or those of all tokens before a letter."""
    space_ids: Collection[int]
    """Ids of pieces that begin with such a space."""
    special_ids: Mapping[str, int]
    """Text of each special token -> id; for trusted code only: `encode` never
    uses it."""
    token_bytes: Sequence[bytes]
    """For each id the UTF-8 bytes that it adds to a text; b"" for specials."""

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Ids of a text. Text never becomes a special token."""
        ...

    def encode_trusted(self, text: str, barrier: str) -> Int32[np.ndarray, "n"]:
        """Ids of a text laid out by a chat template: special tokens are matched.

        `barrier` is a character that breaks up what must stay text: nothing is matched
        across it, and it leaves no trace in the ids.
        """
        ...

    def decode(self, ids: Integer[np.ndarray, "n"] | Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def pieces(self, text: str) -> list[Piece]:
        """The ids of `encode(text)` with their byte ranges in the text."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what `read_saved_tokenizer` reads into an existing folder."""
        ...


class TextStream:
    """Turns ids into text one at a time, and never shows half a character.

    The texts that `feed` and `finish` return, concatenated, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.leading_spaces != "keep"

    def feed(self, token_id: int) -> str:
        """Text that is complete now; "" while a character lacks bytes.

        Raises:
          ValueError: for an id outside the vocabulary.
        """
        if not 0 <= token_id < self._tokenizer.vocab_size:
            check_ids(np.asarray([token_id], np.int64), self._tokenizer.vocab_size)
        data = self._tokenizer.token_bytes[token_id]
        if self._at_start and data:
            data = self._drop_space(token_id, data)
        return self._utf8.decode(data)

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
        """What is left at the end: U+FFFD for the bytes of an unfinished character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def decode_ids(
    tokenizer: Tokenizer, ids: Integer[np.ndarray, "n"] | Sequence[int]
) -> str:
    """Text of ids, by the table `tokenizer.token_bytes`.

    Raises:
      ValueError: for an id outside the vocabulary.
    """
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    check_ids(array, tokenizer.vocab_size)
    table, rest = tokenizer.token_bytes, array.tolist()
    stream, head = TextStream(tokenizer), ""
    if tokenizer.leading_spaces != "keep":
        # Only the beginning depends on what came before: step through it.
        used = 0
        while used < len(rest) and stream._at_start:
            head += stream.feed(rest[used])
            used += 1
        rest = rest[used:]
    data = b"".join([table[i] for i in rest])
    return head + stream._utf8.decode(data, final=True)


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


def write_description(
    folder: Path, kind: str, fingerprint: str, values: dict[str, Any]
) -> None:
    """Writes tokenizer.json: kind, version, fingerprint and what the kind needs."""
    description = {"kind": kind, "version": FORMAT_VERSION, "fingerprint": fingerprint}
    text = json.dumps({**description, **values}, indent=1, sort_keys=True)
    (Path(folder) / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")


def tile_bytes(ids: Iterable[int], lengths: Iterable[int]) -> list[Piece]:
    """Adjacent pieces, given their lengths in bytes."""
    pieces, at = [], 0
    for token_id, length in zip(ids, lengths, strict=True):
        pieces.append(Piece(token_id, at, at + length))
        at += length
    return pieces
