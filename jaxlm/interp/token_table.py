"""The tokens of a text: their ids, their bytes, and where in the text they are."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from jaxlm.tokenizers.base import TextStream, Tokenizer


class TokenRow(NamedTuple):
    """A token of a text."""

    id: int
    data: bytes
    """UTF-8 bytes that it adds to the text; b"" for a special token. A token may begin
    or end inside a character."""
    start: int
    """Offset of its first byte in the text."""
    end: int
    """Offset after its last byte."""
    first_character: int
    """Index of the character in which its first byte lies."""
    last_character: int
    """Index after the character in which its last byte lies: two tokens that share a
    character overlap here."""
    special: str | None
    """The text of a special token, which is not in the text; else None."""


def token_table(
    tokenizer: Tokenizer, ids: Sequence[int] | Integer[np.ndarray, " T"]
) -> list[TokenRow]:
    """Returns a row for each id; offsets are those in `tokenizer.decode(ids)`.

    Bytes that are not UTF-8 count as themselves, and as one character U+FFFD for each
    that `decode` shows.

    Raises:
      ValueError: for an id outside the vocabulary.
    """
    names = {i: text for text, i in tokenizer.special_ids.items()}
    stream, utf8 = TextStream(tokenizer), codecs.getincrementaldecoder("utf-8")
    decoder = utf8(errors="replace")
    rows, start, done = [], 0, 0
    for token_id in map(int, ids):
        data, first = stream.next_bytes(token_id), done
        done += len(decoder.decode(data))
        # Bytes of a character that is not complete yet.
        pending = bool(decoder.getstate()[0])
        end = start + len(data)
        last = done + pending if data else first
        special = names.get(token_id)
        rows.append(TokenRow(token_id, data, start, end, first, last, special))
        start = end
    return rows
