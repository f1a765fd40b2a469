"""SentencePiece models that keep user text as text and know each token's bytes."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import Int32
from sentencepiece import SentencePieceProcessor

from jaxlm.fields import to_dict
from jaxlm.terminal.printable import error_line
from jaxlm.tokenizers.base import (
    Piece,
    Tokenizer,
    check_text,
    fingerprint_of,
    tile_bytes,
)
from jaxlm.tokenizers.sentencepiece.model_proto import (
    BYTE,
    CONTROL,
    SPACE_SIGN,
    UNKNOWN,
    USER_DEFINED,
    ModelTable,
    literal_model,
)
from jaxlm.tokenizers.special_tokens import Special, SpecialTokens, TokenizerSettings

MODEL_FILE = "sentencepiece.model"
# The largest published models have about 5 MB; the bound catches wrong paths.
MAX_MODEL_BYTES = 64 << 20

_SPACE_SIGN_BYTES = SPACE_SIGN.encode("utf-8")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    `encode` returns what the library returns, with two exceptions. User-defined pieces
    such as `<start_of_turn>`, unless they are white space, are not matched in text, so
    text typed by a user never becomes a special id. And where the model keeps text
    unchanged (no normalization, no added space, byte fallback), U+2581 is encoded as
    its three bytes, so decoding returns exactly the text that was encoded.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, settings: TokenizerSettings | None = None):
        """Takes the contents of a .model file.

        Args:
          model: a serialized `ModelProto`.
          settings: from files next to the model; None takes the ids that the model
            names, and no chat template.

        Raises:
          ValueError: when it is not a SentencePiece model, or lacks an id of the
            settings.
        """
        self.model = model
        """The contents of the file."""
        if not model:
            raise ValueError("not a SentencePiece model: it is empty")
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            self.table = ModelTable(model)
            if USER_DEFINED in self.table.types:
                model_proto = literal_model(model)
                self._processor = SentencePieceProcessor(model_proto=model_proto)
        except (RuntimeError, DecodeError, ValueError) as error:
            words = error_line(error)
            raise ValueError(f"not a SentencePiece model: {words}") from None
        self.vocab_size = len(self.table.types)
        ids = (getattr(self._processor, f"{n}_id")() for n in ("bos", "eos", "pad"))
        bos, eos, pad = (i if i >= 0 else None for i in ids)
        own = TokenizerSettings(bos, eos, pad)
        self._take(own if settings is None else settings)
        self._has_own_settings = self.settings == own
        # Without settings of its own, a model has the fingerprint of its contents.
        same = self.settings.ids == own.ids
        others = b"" if same else b"\0" + json.dumps(self.settings.ids).encode()
        self.fingerprint = fingerprint_of(self.kind, model + others)
        if self.table.remove_extra_whitespaces:
            self.leading_spaces = "drop all"
        elif self.table.add_dummy_prefix:
            self.leading_spaces = "drop one"

    @classmethod
    def from_file(
        cls, path: Path | str, settings: TokenizerSettings | None = None
    ) -> "SentencePieceTokenizer":
        """Loads a .model file of at most 64 MiB.

        Raises:
          ValueError: when it is missing, not a file, too large or not a model.
        """
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise ValueError(f"{path}: no such SentencePiece .model file")
        size = os.path.getsize(path)
        if size > MAX_MODEL_BYTES:
            raise ValueError(
                f"{path}: {size} bytes is too large for a SentencePiece model (at most "
                f"{MAX_MODEL_BYTES}): is it another file?"
            )
        try:
            return cls(path.read_bytes(), settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id adds to a text; none for control pieces."""
        table = self.table
        return [
            _bytes_of(piece, kind, table.unknown_surface)
            for piece, kind in zip(table.pieces, table.types, strict=True)
        ]

    @cached_property
    def space_ids(self) -> frozenset[int]:
        """Ids of text pieces that begin with a space; byte pieces do not count."""
        table = self.table
        everything = enumerate(zip(table.pieces, table.types, strict=True))
        return frozenset(
            i
            for i, (piece, kind) in everything
            if piece.startswith(SPACE_SIGN) and kind not in (BYTE, CONTROL, UNKNOWN)
        )

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Control and user-defined pieces, except white space."""
        return {text: special.id for text, special in self._specials.tokens.items()}

    @cached_property
    def _specials(self) -> SpecialTokens:
        found = self.table.special_pieces()
        return SpecialTokens({t: Special(i) for i, t, _ in found if t.strip()})

    @cached_property
    def _space_sign_ids(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_SIGN_BYTES]

    def _parts(self, text: str) -> Iterator[str]:
        """Splits off each U+2581, if the model keeps text unchanged."""
        if self.table.keeps_text and SPACE_SIGN in text:
            yield from (p for p in re.split(f"({SPACE_SIGN})", text) if p)
        else:
            yield text

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Encodes a text; control and user-defined ids never come from text.

        Raises:
          ValueError: for a lone surrogate.
        """
        check_text(text)
        ids: list[int] = []
        for part in self._parts(text):
            if part == SPACE_SIGN and self.table.keeps_text:
                ids += self._space_sign_ids
            else:
                ids += self._processor.encode(part)
        return np.asarray(ids, np.int32)

    def pieces(self, text: str) -> list[Piece]:
        """Returns the ids of `encode(text)` with their byte ranges in the text."""
        check_text(text)
        found: list[Piece] = []
        at = 0
        for part in self._parts(text):
            data = part.encode("utf-8")
            if part == SPACE_SIGN and self.table.keeps_text:
                found += tile_bytes(self._space_sign_ids, [1] * len(data), at)
            else:
                mapping = self._processor.encode(data, return_type="offset_mapping")
                found += self._with_byte_offsets(mapping["ids"], mapping["offsets"], at)
            at += len(data)
        return found

    def _with_byte_offsets(
        self, ids: list[int], offsets: list[tuple[int, int]], at: int
    ) -> list[Piece]:
        """Returns pieces in which each byte piece has one byte.

        The library gives all bytes of a character to its last byte piece, and none to
        the others.
        """
        found: list[Piece] = []
        pending: list[int] = []
        start = 0
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            is_byte = self.table.types[token_id] == BYTE
            if is_byte and start == end:
                pending.append(token_id)
                continue
            lengths = [0] * len(pending) + [end - start]
            if is_byte and end - start == len(lengths):
                lengths = [1] * len(lengths)
            found += tile_bytes([*pending, token_id], lengths, at + start)
            pending = []
        return found + tile_bytes(pending, [0] * len(pending), at + start)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and sentencepiece.model into an existing folder."""
        (Path(folder) / MODEL_FILE).write_bytes(self.model)
        values: dict[str, Any] = {"model": MODEL_FILE}
        if not self._has_own_settings:
            values["habits"] = to_dict(self.settings)
        self._write_description(folder, **values)


def _bytes_of(piece: str, kind: int, unknown_surface: bytes) -> bytes:
    if kind == BYTE:
        return bytes([int(piece[3:5], 16)])
    if kind == CONTROL:
        return b""
    if kind == UNKNOWN:
        return unknown_surface
    return piece.replace(SPACE_SIGN, " ").encode("utf-8")
