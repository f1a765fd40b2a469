"""The two tokenizers without a model file: UTF-8 bytes and characters."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Int32, Integer

from jaxlm.tokenizers.base import (
    Piece,
    Tokenizer,
    check_text,
    decode_ids,
    fingerprint_of,
    tile_bytes,
    write_description,
)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 ends a document."""

    kind = "bytes"
    vocab_size = 257
    bos_id = None
    eos_id: int = 256
    pad_id = None
    stop_ids = (256,)
    adds_bos = False
    chat_template = None
    special_ids = MappingProxyType({})
    leading_spaces = "keep"
    space_ids = ()
    fingerprint = fingerprint_of("bytes", b"1")
    token_bytes = (*(bytes([i]) for i in range(256)), b"")

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Returns one id for each UTF-8 byte.

        Raises:
          ValueError: for a lone surrogate.
        """
        check_text(text)
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_trusted(self, text: str, barrier: str) -> Int32[np.ndarray, "n"]:
        """Encodes the text without barriers; there are no special tokens."""
        return self.encode(text.replace(barrier, ""))

    def decode(self, ids: Integer[np.ndarray, "n"] | Sequence[int]) -> str:
        """Decodes ids; raises ValueError for an id outside the vocabulary."""
        return decode_ids(self, ids)

    def pieces(self, text: str) -> list[Piece]:
        """Returns one piece for each byte."""
        ids = self.encode(text).tolist()
        return tile_bytes(ids, [1] * len(ids))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        write_description(folder, self.kind, self.fingerprint, {})


class CharTokenizer(Tokenizer):
    """The distinct characters of a text, sorted; no special tokens."""

    kind = "chars"
    bos_id = None
    eos_id = None
    pad_id = None
    stop_ids = ()
    adds_bos = False
    chat_template = None
    special_ids = MappingProxyType({})
    leading_spaces = "keep"
    space_ids = ()

    def __init__(self, characters: Iterable[str]):
        """Takes any text; its distinct characters become the vocabulary.

        Raises:
          ValueError: when there is no character, or one is a lone surrogate.
        """
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("a character tokenizer needs at least one character")
        check_text(self.characters)
        self.vocab_size = len(self.characters)
        self.fingerprint = fingerprint_of(self.kind, self.characters.encode("utf-8"))

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each character."""
        return [c.encode("utf-8") for c in self.characters]

    @cached_property
    def _id_of_code_point(self) -> Int32[np.ndarray, "code_points"]:
        # The last entry, -1, is for all code points above the highest known one.
        points = np.array([ord(c) for c in self.characters])
        table = np.full(points[-1] + 2, -1, np.int32)
        table[points] = np.arange(self.vocab_size, dtype=np.int32)
        return table

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Returns one id for each character.

        Raises:
          ValueError: for a character that the vocabulary lacks, with its offset.
        """
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        table = self._id_of_code_point
        ids = table[np.minimum(points, len(table) - 1)]
        if ids.size and ids.min() < 0:
            at = int(np.argmin(ids))
            raise ValueError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at offset {at} of the "
                f"text is not among the {self.vocab_size} characters of the tokenizer: "
                "remove it, or train with data.tokenizer 'bytes' or 'sentencepiece'"
            )
        return ids

    def encode_trusted(self, text: str, barrier: str) -> Int32[np.ndarray, "n"]:
        """Encodes the text without barriers; there are no special tokens."""
        return self.encode(text.replace(barrier, ""))

    def decode(self, ids: Integer[np.ndarray, "n"] | Sequence[int]) -> str:
        """Decodes ids; raises ValueError for an id outside the vocabulary."""
        return decode_ids(self, ids)

    def pieces(self, text: str) -> list[Piece]:
        """Returns one piece for each character."""
        ids = self.encode(text).tolist()
        return tile_bytes(ids, [len(self.token_bytes[i]) for i in ids])

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        values = {"characters": self.characters}
        write_description(folder, self.kind, self.fingerprint, values)
