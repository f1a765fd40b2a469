"""Hugging Face tokenizers that keep user text as text and know each token's bytes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int32

from jaxlm.fields import to_dict
from jaxlm.terminal.printable import error_line
from jaxlm.tokenizers.base import (
    Piece,
    Tokenizer,
    check_text,
    fingerprint_of,
    tile_bytes,
)
from jaxlm.tokenizers.hugging_face.decoder import decoding_of
from jaxlm.tokenizers.hugging_face.limits import (
    check_steps,
    check_tokens,
    try_patterns,
)
from jaxlm.tokenizers.hugging_face.literal import literal
from jaxlm.tokenizers.hugging_face.tokenizer_json import (
    added_tokens,
    damage_in,
    parse,
    pipeline,
    vocabulary,
)
from jaxlm.tokenizers.special_tokens import Special, SpecialTokens, TokenizerSettings

MODEL_FILE = "huggingface.json"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the library `tokenizers`.

    `encode` returns what the library returns with `add_special_tokens=False`, except
    that added tokens, special or not, are not matched in text unless they are white
    space: text typed by a user never becomes one of them. `encode_trusted` returns,
    without barriers, the ids of the library for the original file. `decode` returns
    what the library returns without special tokens.
    """

    kind = "huggingface"

    def __init__(
        self, tokenizer_json: str | bytes, settings: TokenizerSettings | None = None
    ):
        """Takes the contents of a tokenizer.json.

        Args:
          tokenizer_json: at most 128 MiB.
          settings: from the files next to it; None: no bos, eos or pad token.

        Raises:
          ValueError: when it is not one, has an unsupported decoder, or lacks an id of
            the settings.
        """
        if isinstance(tokenizer_json, str):
            tokenizer_json = tokenizer_json.encode("utf-8")
        self.tokenizer_json = tokenizer_json
        """The contents of the file, unchanged."""
        self.data = parse(tokenizer_json)
        with damage_in("this tokenizer.json"):
            self._pipeline = pipeline(self.data)
            self._vocabulary = vocabulary(self.data)
            self._added = added_tokens(self.data)
            check_tokens(self._vocabulary, self._added, self.data["model"])
            check_steps(self._pipeline, self.data["model"])
            self._decoding = decoding_of(self._pipeline["decoder"])
            ids = [*self._vocabulary.values(), *(t.id for t in self._added)]
            self.vocab_size = max(ids, default=-1) + 1
            self._take(TokenizerSettings() if settings is None else settings)
            self._library = self._load_literal(later=False)

        ids_of_settings = json.dumps(self.settings.ids).encode()
        self.fingerprint = fingerprint_of(
            self.kind, tokenizer_json + b"\0" + ids_of_settings
        )
        self.leading_spaces = self._decoding.leading_spaces

    @classmethod
    def from_folder(
        cls, folder: Path, settings: TokenizerSettings | None = None
    ) -> "HuggingFaceTokenizer":
        """Loads what `save` wrote; not for folders that come from Hugging Face.

        `tokenizer_from_folder` reads those.

        Raises:
          ValueError: when the file is missing or not a tokenizer.
        """
        path = Path(folder) / MODEL_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        try:
            return cls(path.read_bytes(), settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """Id -> text as written in the file (byte-level: in GPT-2's alphabet)."""
        of_model = {i: text for text, i in self._vocabulary.items()}
        return of_model | {t.id: t.content for t in self._added}

    @cached_property
    def _named(self) -> dict[str, int]:
        """Special tokens that the files name: unknown, bos, eos and pad."""
        parts = [self._unknown_id, *self.settings.ids[:3]]
        return {self.tokens[i]: i for i in parts if i in self.tokens}

    @cached_property
    def _unknown_id(self) -> int | None:
        """Id of the unknown token (Unigram names its id, others its text)."""
        model = self.data["model"]
        return self._vocabulary.get(model.get("unk_token"), model.get("unk_id"))

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Added tokens, except white space, and the bos, eos and pad tokens."""
        return {t.content: t.id for t in self._added if not t.is_white} | self._named

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Ids that add nothing to decoded text."""
        special = (t.id for t in self._added if t.special)
        return frozenset([*special, *self._named.values()])

    @cached_property
    def _specials(self) -> SpecialTokens:
        found = {text: Special(i) for text, i in self._named.items()}
        for t in self._added:
            if not t.is_white:
                found[t.content] = Special(t.id, t.lstrip, t.rstrip, t.single_word)
        return SpecialTokens(found)

    def _load_literal(self, *, later: bool) -> tokenizers.Tokenizer:
        parts = (self.data, self._vocabulary, self._added, self.special_ids)
        data = json.dumps(literal(*parts, later=later))
        if not later:
            try_patterns(self._pipeline, data)
        with _errors_of_the_library("not a Hugging Face tokenizer.json"):
            library = tokenizers.Tokenizer.from_str(data)
        for t in self._added:
            if t.is_white and library.token_to_id(t.content) != t.id:
                raise ValueError(
                    f"added_tokens: {t.content!r} has the id {t.id}, but the library "
                    f"gives it {library.token_to_id(t.content)}"
                )
        return library

    @cached_property
    def _later(self) -> tokenizers.Tokenizer:
        """Encodes text that follows a special token."""
        if "prepend_scheme" not in json.dumps(self.data.get("pre_tokenizer")):
            return self._library
        return self._load_literal(later=True)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id adds to a text; none for special tokens."""
        table = [b""] * self.vocab_size
        for text, i in self._vocabulary.items():
            table[i] = self._decoding.bytes_of(text)
        for t in self._added:
            # Added tokens are plain text, not in the model's alphabet.
            table[t.id] = t.content.encode("utf-8")
        for i in self._control_ids:
            table[i] = b""
        return table

    @cached_property
    def space_ids(self) -> frozenset[int]:
        """Ids whose text begins with a space."""
        return frozenset(i for i, b in enumerate(self.token_bytes) if b[:1] == b" ")

    def encode(self, text: str) -> Int32[np.ndarray, "n"]:
        """Encodes a text; added tokens never come from text.

        Raises:
          ValueError: for a lone surrogate, or a character that the vocabulary lacks.
        """
        return np.asarray(self._encode(text, self._library).ids, np.int32)

    def _encode(self, text: str, library: tokenizers.Tokenizer) -> tokenizers.Encoding:
        check_text(text)
        with _errors_of_the_library("the tokenizer has no ids for this text"):
            encoding = library.encode(text, add_special_tokens=False)
        # `literal` hides these tokens from all known kinds of models; no file may get
        # around that.
        found = self._never_from_text.intersection(encoding.ids)
        if found:
            raise ValueError(
                f"the text became the special token {self.tokens[min(found)]!r}: this "
                "tokenizer.json cannot keep text apart from special tokens"
            )
        return encoding

    @cached_property
    def _never_from_text(self) -> frozenset[int]:
        return frozenset(self.special_ids.values()) - {self._unknown_id}

    def _encode_part(self, part: str, at_start: bool) -> Sequence[int]:
        return self._encode(part, self._library if at_start else self._later).ids

    def pieces(self, text: str) -> list[Piece]:
        """Returns the ids of `encode(text)` with their byte ranges in the text."""
        encoding = self._encode(text, self._library)
        ids, data = encoding.ids, text.encode("utf-8")
        sizes = [len(self.token_bytes[i]) for i in ids]
        written = b"".join([self.token_bytes[i] for i in ids])
        if written == data:
            return tile_bytes(ids, sizes)
        if written == b" " + data and sizes[0]:
            sizes[0] -= 1  # The model adds a space before the first word.
            return tile_bytes(ids, sizes)
        return _with_byte_offsets(text, ids, encoding.offsets, sizes)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and huggingface.json into an existing folder."""
        (Path(folder) / MODEL_FILE).write_bytes(self.tokenizer_json)
        habits = to_dict(self.settings)
        self._write_description(folder, model=MODEL_FILE, habits=habits)


@contextmanager
def _errors_of_the_library(what: str) -> Iterator[None]:
    """Converts the library's plain Exception, and its BaseException on a panic."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            words = error_line(error)
            raise ValueError(f"{what}: {words}") from None
        raise


def _with_byte_offsets(
    text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]], sizes: list[int]
) -> list[Piece]:
    """Makes pieces from spans in characters.

    The library gives the whole character to each of the tokens that make it up. These
    tokens share its bytes if their sizes add up to it, else the last one gets them all.
    Where spans overlap, the first one keeps the common part.
    """
    lengths = [len(c.encode("utf-8")) for c in text]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
    beyond = len(text)  # Some steps of the library return offsets past the end.
    found: list[Piece] = []
    first = at = 0
    while first < len(ids):
        start, end = (max(at, offsets[min(i, beyond)]) for i in spans[first])
        last = first
        while last + 1 < len(ids) and spans[last + 1] == spans[first] and start < end:
            last += 1
        group = range(first, last + 1)
        lengths = [sizes[i] for i in group]
        if sum(lengths) != end - start:
            lengths = [0] * (last - first) + [end - start]
        found += tile_bytes([ids[i] for i in group], lengths, start)
        first, at = last + 1, end
    return found
