"""The file format of SentencePiece models (sentencepiece_model.proto), by hand.

A ModelProto has in field 1 the pieces (1 text, 2 score, 3 type), in field 2 the trainer
(3 algorithm, 35 byte fallback, 40 id of the unknown piece, 44 text of unknowns), in
field 3 the normalizer (2 character map, 3 added space, 4 white space removed).
"""

import struct
from collections.abc import Iterator, Sequence

# SentencePiece writes a space as this sign, U+2581, so that the sign itself would come
# back as a space.
SPACE_SIGN = "\u2581"

# Types of a piece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Algorithms.
UNIGRAM, BPE = 1, 2


class ModelTable:
    """The parts of a model that the library's Python interface does not show."""

    def __init__(self, model: bytes):
        self._model = model
        self.pieces: list[str] = []
        self.scores: list[float] = []
        self.types: list[int] = []
        self._type_offsets: list[int | None] = []
        trainer: dict[int, int | tuple[int, int]] = {}
        normalizer: dict[int, int | tuple[int, int]] = {}
        for number, value, _ in _fields(model, 0, len(model)):
            if number == 1:
                self._add_piece(*value)
            elif number == 2:
                trainer = {n: v for n, v, _ in _fields(model, *value)}
            elif number == 3:
                normalizer = {n: v for n, v, _ in _fields(model, *value)}
        surface = trainer.get(44)
        self.unknown_surface = model[slice(*surface)] if surface else b" \xe2\x81\x87 "
        self.algorithm = trainer.get(3, UNIGRAM)
        self.byte_fallback = bool(trainer.get(35, 0))
        self.add_dummy_prefix = bool(normalizer.get(3, 1))
        self.remove_extra_whitespaces = bool(normalizer.get(4, 1))
        self.charsmap = model[slice(*normalizer.get(2, (0, 0)))]
        self.keeps_text = (
            not self.charsmap
            and not self.add_dummy_prefix
            and not self.remove_extra_whitespaces
            and self.byte_fallback
        )

    def _add_piece(self, start: int, end: int) -> None:
        text, score, kind, offset = "", 0.0, NORMAL, None
        for number, value, at in _fields(self._model, start, end):
            if number == 1:
                text = self._model[slice(*value)].decode("utf-8")
            elif number == 2:
                data = self._model[slice(*value)]
                if len(data) != 4:
                    raise IndexError(f"the score at byte {at} is cut off")
                (score,) = struct.unpack("<f", data)
            elif number == 3:
                kind, offset = value, at
        self.pieces.append(text)
        self.scores.append(score)
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
            if kind == USER_DEFINED and piece.replace(SPACE_SIGN, " ").strip():
                model[offset] = CONTROL
        return bytes(model)


def build_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
    """A BPE model without normalization; one piece has the type UNKNOWN."""
    trainer = _integer(3, BPE) + _integer(4, len(pieces)) + _integer(35, BYTE in types)
    trainer += _integer(40, list(types).index(UNKNOWN))
    trainer += _bytes(45, pieces[list(types).index(UNKNOWN)].encode())
    normalizer = _bytes(1, b"identity") + _integer(3, add_dummy_prefix)
    normalizer += _integer(4, remove_extra_whitespaces) + _integer(5, True)
    parts = map(piece_field, pieces, scores, types)
    return b"".join(parts) + _bytes(2, trainer) + _bytes(3, normalizer)


def piece_field(piece: str, score: float, kind: int) -> bytes:
    """A piece as field 1; at the end of a model it gets the next id."""
    value = _bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
    return _bytes(1, value + _integer(3, kind))


def _integer(number: int, value: int) -> bytes:
    return _varint_bytes(number << 3) + _varint_bytes(int(value))


def _bytes(number: int, value: bytes) -> bytes:
    return _varint_bytes(number << 3 | 2) + _varint_bytes(len(value)) + value


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


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
