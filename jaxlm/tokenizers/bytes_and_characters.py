"""The two tokenizers without a model file: UTF-8 bytes and characters."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxlm.tokenizers.base import Tokenizer, check_text, fingerprint_of


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 ends a document."""

    kind = "bytes"
    vocab_size = 257
    eos_id: int = 256
    stop_ids = (256,)
    fingerprint = fingerprint_of("bytes", b"1")
    token_bytes = (*(bytes([i]) for i in range(256)), b"")

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Returns one id for each UTF-8 byte.

        Raises:
          ValueError: for a lone surrogate.
        """
        check_text(text)
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        self._write_description(folder)


class CharTokenizer(Tokenizer):
    """The distinct characters of a text, sorted; no special tokens."""

    kind = "chars"

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
                "remove it, or train with data.tokenizer 'bytes' or 'bpe'"
            )
        return ids

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        self._write_description(folder, characters=self.characters)
