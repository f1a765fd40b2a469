"""SentencePiece models: user text stays text, and each token knows its bytes."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int32, Integer

from jaxlm.data.text_stream import (
    Piece,
    check_text,
    decode_ids,
    fingerprint_of,
    write_description,
)

MODEL_FILE = "sentencepiece.model"
# The largest published models are near 5 MB; a bound keeps a wrong path harmless.
MAX_MODEL_BYTES = 64 << 20

# SentencePiece writes a space as this sign, U+2581, so that the sign itself would come
# back as a space.
SPACE_SIGN = "\u2581"
_SPACE_SIGN_BYTES = SPACE_SIGN.encode("utf-8")

# Types of a piece in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


class SentencePieceTokenizer:
    """A SentencePiece model.

    `encode` gives what the library gives, with two exceptions. User-defined pieces
    such as `<start_of_turn>` are not matched in text (those of white space only are):
    text that a user typed never becomes a special id. And where the model keeps text
    as it is (no normalization, no added space, byte fallback), U+2581 is written as
    its three bytes, so that decoding gives back exactly what was encoded.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        """Takes the contents of a .model file.

        Raises:
          ValueError: when they are not a SentencePiece model.
        """
        self._model = model
        if not model:
            raise ValueError("not a SentencePiece model: it is empty")
        try:
            self._processor = _load(model)
            self._table = _ModelTable(model)
        except (RuntimeError, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        literal = self._table.with_literal_symbols()
        if literal != model:
            self._processor = _load(literal)
        self.vocab_size = len(self._table.types)
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.pad_id = _id_or_none(self._processor.pad_id())
        self.fingerprint = fingerprint_of(self.kind, model)
        self.leading_spaces = "keep"
        if self._table.remove_extra_whitespaces:
            self.leading_spaces = "drop all"
        elif self._table.add_dummy_prefix:
            self.leading_spaces = "drop one"

    @classmethod
    def from_file(cls, path: Path | str) -> "SentencePieceTokenizer":
        """Loads a .model file of at most 64 MiB.

        Raises:
          ValueError: when it is missing, no file, too large or not a model.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise ValueError(f"{path}: no such SentencePiece .model file")
        size = os.path.getsize(path)
        if size > MAX_MODEL_BYTES:
            raise ValueError(
                f"{path}: {size} bytes is too large for a SentencePiece model (at most "
                f"{MAX_MODEL_BYTES}): is it another file?"
            )
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_folder(cls, folder: Path) -> "SentencePieceTokenizer":
        """Loads what `save` wrote; raises ValueError as `from_file` does."""
        return cls.from_file(Path(folder) / MODEL_FILE)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id adds to a text: none for control pieces."""
        table = self._table
        return [
            _bytes_of(piece, kind, table.unknown_surface)
            for piece, kind in zip(table.pieces, table.types, strict=True)
        ]

    @cached_property
    def space_ids(self) -> frozenset[int]:
        """Pieces of text that begin with a space; a byte piece is none of them."""
        table = self._table
        everything = enumerate(zip(table.pieces, table.types, strict=True))
        return frozenset(
            i
            for i, (piece, kind) in everything
            if piece.startswith(SPACE_SIGN) and kind not in (_BYTE, _CONTROL, _UNKNOWN)
        )

    @cached_property
    def _space_sign_ids(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_SIGN_BYTES]

    def _parts(self, text: str) -> Iterator[str]:
        """Splits off each U+2581 of a model that keeps text as it is."""
        if self._table.keeps_text and SPACE_SIGN in text:
            yield from (p for p in re.split(f"({SPACE_SIGN})", text) if p)
        else:
            yield text

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Ids of a text; control and user-defined ids never come from text.

        Raises:
          ValueError: for a lone surrogate.
        """
        check_text(text)
        ids: list[int] = []
        for part in self._parts(text):
            if part == SPACE_SIGN and self._table.keeps_text:
                ids += self._space_sign_ids
            else:
                ids += self._processor.encode(part)
        return np.asarray(ids, np.int32)

    def decode(self, ids: Integer[np.ndarray, "n"] | Sequence[int]) -> str:
        """Text of ids; raises ValueError for an id outside the vocabulary."""
        return decode_ids(self, ids)

    def pieces(self, text: str) -> list[Piece]:
        """The ids of `encode(text)` with their bytes in the text.

        Where the model changes text (normalization, an added space) a piece may be
        empty, or stand for more bytes than its own.
        """
        check_text(text)
        found: list[Piece] = []
        at = 0
        for part in self._parts(text):
            data = part.encode("utf-8")
            if part == SPACE_SIGN and self._table.keeps_text:
                ids = self._space_sign_ids
                found += [Piece(t, at + i, at + i + 1) for i, t in enumerate(ids)]
            else:
                mapping = self._processor.encode(data, return_type="offset_mapping")
                found += self._with_byte_offsets(mapping["ids"], mapping["offsets"], at)
            at += len(data)
        return found

    def _with_byte_offsets(
        self, ids: list[int], offsets: list[tuple[int, int]], at: int
    ) -> list[Piece]:
        """Pieces, with one byte for each byte piece.

        The library gives all bytes of a character to its last byte piece, and none to
        those before.
        """
        found: list[Piece] = []
        waiting: list[int] = []
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            is_byte = self._table.types[token_id] == _BYTE
            if is_byte and start == end:
                waiting.append(token_id)
                continue
            if is_byte and end - start == len(waiting) + 1:
                group = [*waiting, token_id]
                found += [
                    Piece(t, at + start + i, at + start + i + 1)
                    for i, t in enumerate(group)
                ]
            else:
                found += [Piece(t, at + start, at + start) for t in waiting]
                found.append(Piece(token_id, at + start, at + end))
            waiting = []
        return found + [Piece(t, at + start, at + start) for t in waiting]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and sentencepiece.model into an existing folder."""
        (Path(folder) / MODEL_FILE).write_bytes(self._model)
        write_description(folder, self.kind, self.fingerprint, {"model": MODEL_FILE})


def _load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _bytes_of(piece: str, kind: int, unknown_surface: bytes) -> bytes:
    if kind == _BYTE:
        return bytes([int(piece[3:5], 16)])
    if kind == _CONTROL:
        return b""
    if kind == _UNKNOWN:
        return unknown_surface
    return piece.replace(SPACE_SIGN, " ").encode("utf-8")


class _ModelTable:
    """The parts of a model that the library's Python interface does not show.

    Reads the protocol buffer by hand (sentencepiece_model.proto): field 1 a piece
    (1 text, 3 type), field 2 the trainer (35 byte fallback, 44 text of unknowns),
    field 3 the normalizer (2 character map, 3 added space, 4 white space removed).
    """

    def __init__(self, model: bytes):
        self._model = model
        self.pieces: list[str] = []
        self.types: list[int] = []
        self._type_offsets: list[int | None] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        for number, value, _ in _fields(model, 0, len(model)):
            if number == 1:
                self._add_piece(*value)
            elif number == 2:
                trainer = {n: v for n, v, _ in _fields(model, *value)}
            elif number == 3:
                normalizer = {n: v for n, v, _ in _fields(model, *value)}
        surface = trainer.get(44)
        self.unknown_surface = model[slice(*surface)] if surface else b" \xe2\x81\x87 "
        self.add_dummy_prefix = bool(normalizer.get(3, 1))
        self.remove_extra_whitespaces = bool(normalizer.get(4, 1))
        charsmap = normalizer.get(2, (0, 0))
        self.keeps_text = (
            charsmap[0] == charsmap[1]
            and not self.add_dummy_prefix
            and not self.remove_extra_whitespaces
            and bool(trainer.get(35, 0))
        )

    def _add_piece(self, start: int, end: int) -> None:
        text, kind, offset = "", _NORMAL, None
        for number, value, at in _fields(self._model, start, end):
            if number == 1:
                text = self._model[slice(*value)].decode("utf-8")
            elif number == 3:
                kind, offset = value, at
        self.pieces.append(text)
        self.types.append(kind)
        self._type_offsets.append(offset)

    def with_literal_symbols(self) -> bytes:
        """The model with user-defined pieces turned into control pieces.

        Encoding matches user-defined pieces in any text, and control pieces in none.
        Both types are one byte, so nothing moves.
        """
        model = bytearray(self._model)
        everything = zip(self.pieces, self.types, self._type_offsets, strict=True)
        for piece, kind, offset in everything:
            if kind == _USER_DEFINED and piece.replace(SPACE_SIGN, " ").strip():
                model[offset] = _CONTROL
        return bytes(model)


def _fields(
    data: bytes, at: int, end: int
) -> Iterator[tuple[int, int | tuple[int, int], int]]:
    """Yields (field number, integer or byte range, offset of the value)."""
    while at < end:
        key, at = _varint(data, at)
        start = at
        if key & 7 == 0:
            value, at = _varint(data, at)
        elif key & 7 == 2:
            length, at = _varint(data, at)
            value, at = (at, at + length), at + length
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
            value = (start, at)
        else:
            raise IndexError(f"unknown wire type at byte {start}")
        yield key >> 3, value, start


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
