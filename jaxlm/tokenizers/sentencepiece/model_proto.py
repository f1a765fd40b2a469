"""The contents of SentencePiece model files, by the library's protobuf classes."""

from collections.abc import Iterator, Sequence

from google.protobuf.unknown_fields import UnknownFieldSet

# Protobuf creates these classes at import, where type checkers cannot see them.
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
    NormalizerSpec,  # pyright: ignore[reportAttributeAccessIssue]
    TrainerSpec,  # pyright: ignore[reportAttributeAccessIssue]
)

from jaxlm.terminal.printable import shown

# SentencePiece writes a space as this character, U+2581. A U+2581 in the text itself
# would therefore be decoded as a space.
SPACE_SIGN = "\u2581"

# Types of pieces.
NORMAL = ModelProto.SentencePiece.NORMAL
UNKNOWN = ModelProto.SentencePiece.UNKNOWN
CONTROL = ModelProto.SentencePiece.CONTROL
USER_DEFINED = ModelProto.SentencePiece.USER_DEFINED
UNUSED = ModelProto.SentencePiece.UNUSED
BYTE = ModelProto.SentencePiece.BYTE
_TYPE_FIELD = ModelProto.SentencePiece.DESCRIPTOR.fields_by_name["type"].number
# Algorithms.
UNIGRAM, BPE = TrainerSpec.UNIGRAM, TrainerSpec.BPE
# Of a unigram model, which tries every piece at each character, and of pieces that are
# matched before anything else. Published ones have 31 at most.
MAX_PIECE_CHARACTERS = 256


class ModelTable:
    """The parts of a model that `SentencePieceProcessor` does not expose."""

    def __init__(self, model: bytes):
        """Parses a serialized `ModelProto`.

        Raises:
          google.protobuf.message.DecodeError: when it is not one.
          UnicodeDecodeError: for a piece that is not UTF-8.
          ValueError: for a piece of an unknown type, or one that is too long.
        """
        proto = ModelProto.FromString(model)
        self.pieces = [_text(p.piece) for p in proto.pieces]
        self.scores = [p.score for p in proto.pieces]
        self.types = [p.type for p in proto.pieces]
        _check_types(proto)
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        self.unknown_surface = _text(trainer.unk_surface).encode("utf-8")
        self.algorithm = trainer.model_type
        self._check_lengths()
        self.byte_fallback = trainer.byte_fallback
        self.add_dummy_prefix = normalizer.add_dummy_prefix
        self.remove_extra_whitespaces = normalizer.remove_extra_whitespaces
        self.charsmap = normalizer.precompiled_charsmap
        self.keeps_text = (
            not self.charsmap
            and not self.add_dummy_prefix
            and not self.remove_extra_whitespaces
            and self.byte_fallback
        )

    def _check_lengths(self) -> None:
        everything = self.algorithm == UNIGRAM
        for piece, kind in zip(self.pieces, self.types, strict=True):
            tried = everything or kind == USER_DEFINED
            if tried and len(piece) > MAX_PIECE_CHARACTERS:
                raise ValueError(
                    f"the piece {shown(piece)} has {len(piece)} characters: at most "
                    f"{MAX_PIECE_CHARACTERS} are read"
                )

    def special_pieces(self) -> Iterator[tuple[int, str, int]]:
        """Yields id, text and type of control, unknown and user-defined pieces."""
        for i, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True)):
            if kind in (CONTROL, UNKNOWN, USER_DEFINED):
                yield i, piece.replace(SPACE_SIGN, " "), kind


def _check_types(proto: ModelProto) -> None:
    """Raises ValueError for an unknown type, which would be taken for ordinary text."""
    known = ModelProto()
    known.CopyFrom(proto)
    known.DiscardUnknownFields()
    if known.ByteSize() == proto.ByteSize():
        return
    # Slow, so only where something is unknown at all.
    for i, piece in enumerate(proto.pieces):
        if any(f.field_number == _TYPE_FIELD for f in UnknownFieldSet(piece)):
            name = shown(_text(piece.piece))
            raise ValueError(f"piece {i}, {name}, has an unknown type")


def _text(value: str | bytes) -> str:
    """Decodes text that protobuf returns as bytes, because it is not UTF-8."""
    return value.decode("utf-8") if isinstance(value, bytes) else value


def literal_model(model: bytes) -> bytes:
    """Turns user-defined pieces, except white space, into control pieces.

    The library matches user-defined pieces in any text, but never control pieces.
    """
    proto = ModelProto.FromString(model)
    for piece in proto.pieces:
        text = piece.piece.replace(SPACE_SIGN, " ")
        if piece.type == USER_DEFINED and text.strip():
            piece.type = CONTROL
    return proto.SerializeToString()


def build_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
    """Builds a BPE model without normalization; one piece has the type UNKNOWN."""
    unknown = list(types).index(UNKNOWN)
    trainer = TrainerSpec(
        model_type=BPE,
        vocab_size=len(pieces),
        byte_fallback=BYTE in types,
        unk_id=unknown,
        unk_piece=pieces[unknown],
    )
    normalizer = NormalizerSpec(
        name="identity",
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        escape_whitespaces=True,
    )
    entries = map(_entry, pieces, scores, types)
    proto = ModelProto(pieces=entries, trainer_spec=trainer, normalizer_spec=normalizer)
    return proto.SerializeToString()


def added_piece(piece: str, score: float, kind: int) -> bytes:
    """Returns bytes that, appended to a model's, add a piece with the next id."""
    return ModelProto(pieces=[_entry(piece, score, kind)]).SerializeToString()


def _entry(piece: str, score: float, kind: int) -> ModelProto.SentencePiece:
    return ModelProto.SentencePiece(piece=piece, score=score, type=kind)
