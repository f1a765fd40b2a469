"""Rows of tokens from a stream of documents, without dropping a token.

A source is one long stream of tokens, document after document. A training row of T
tokens is T + 1 consecutive tokens of it: each is predicted from those before it in
its document. Pure NumPy; a batch of rows is built at once.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt, UInt64

from jaxlm.data.token_file import TokenFile
from jaxlm.types import Batch


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a source, or of its held-out part."""

    name: str
    """Entry of data.path and file of its tokens, for messages."""
    tokens: TokenFile | UInt[np.ndarray, "n"]
    """Token ids."""
    documents: Int64[np.ndarray, "documents"]
    """Offset of each document's first token; the first is 0."""
    vocab_size: int
    """Ids must be below this."""
    offset: int = 0
    """Offset of the stream in its file, in tokens, for messages."""

    def num_rows(self, length: int) -> int:
        """Number of training rows of `length` tokens in an epoch."""
        return len(self.tokens) // length

    def num_eval_rows(self, length: int) -> int:
        """Number of evaluation rows of `length` tokens."""
        return max(0, -(-(len(self.tokens) - 1) // length))


def split_stream(
    stream: TokenStream, holdout_fraction: float
) -> tuple[TokenStream, TokenStream]:
    """Splits off the last `holdout_fraction` of the tokens: (training, held out).

    The training part has `int((1 - holdout_fraction) * n)` of n tokens, as in nanoGPT.
    A document across the border is cut in two.
    """
    border = int((1 - holdout_fraction) * len(stream.tokens))
    first = int(np.searchsorted(stream.documents, border))
    rest = stream.documents[first:] - border
    if border < len(stream.tokens) and (not len(rest) or rest[0] > 0):
        rest = np.concatenate([np.zeros(1, np.int64), rest])
    tokens, documents = stream.tokens, stream.documents
    train = replace(stream, tokens=tokens[:border], documents=documents[:first])
    offset = stream.offset + border
    rest = replace(stream, tokens=tokens[border:], documents=rest, offset=offset)
    return train, rest


def mix_bits(*values: int | Int[np.ndarray, "*s"]) -> UInt64[np.ndarray, "*s"]:
    """Hashes whole numbers (splitmix64), alike on every machine.

    Args:
      values: one or more numbers or arrays of numbers, broadcast against each other.
    """
    state = np.zeros((), np.uint64)
    # Products are meant to overflow.
    with np.errstate(over="ignore"):
        for value in values:
            if isinstance(value, int):
                value = np.uint64(value % 2**64)
            state = state ^ np.asarray(value).astype(np.uint64)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


@lru_cache(maxsize=1024)
def epoch_offset(seed: int, epoch: int, length: int) -> int:
    """Offset of an epoch's first row, in [0, length).

    It differs by epoch, so that rows are not always cut at the same tokens, and the
    tokens that do not fill a row are not always the same.
    """
    return int(mix_bits(seed, epoch)) % length


def train_rows(
    stream: TokenStream,
    first: Int64[np.ndarray, "B"],
    length: int,
    segment_attention: bool = True,
) -> Batch:
    """Builds rows that begin anywhere in the stream and wrap around at its end.

    Args:
      stream: at least `length + 1` tokens.
      first: offset of each row's first token, in [0, n).
      length: tokens in a row, T.
      segment_attention: give each document of a row its own segment, restart positions
        there and predict nothing across documents. Otherwise a row is one segment, and
        only the first token after a wrap-around is not predicted.

    Returns:
      A batch of NumPy arrays [B, length].

    Raises:
      ValueError: when an id is not in the vocabulary, with its offset.
    """
    size = len(stream.tokens)
    rows = np.empty((len(first), length + 1), np.int32)
    for row, start in zip(rows, first.tolist(), strict=True):
        end = start + length + 1
        if end <= size:
            row[:] = stream.tokens[start:end]
        else:
            row[: size - start] = stream.tokens[start:]
            row[size - start :] = stream.tokens[: end - size]
    _check_ids(stream, rows, first)
    documents = stream.documents if segment_attention else stream.documents[:0]
    starts = _document_starts(documents, first, length)
    wrapped = np.flatnonzero(first + length >= size)
    starts[wrapped] |= _document_starts(documents, first[wrapped] - size, length)
    starts[wrapped, size - first[wrapped]] = True
    return _as_batch(rows, starts, segment_attention)


def eval_rows(
    stream: TokenStream,
    index: Int64[np.ndarray, "B"],
    length: int,
    segment_attention: bool = True,
) -> Batch:
    """Builds consecutive rows from the start of the stream; the last one is padded.

    Over all rows, each token except the first of a document (without
    `segment_attention`: of the stream) is a target of weight 1 exactly once.

    Args:
      stream: held-out tokens.
      index: index of each row; indices past the end give rows of padding.
      length: tokens in a row, T.
      segment_attention: as in `train_rows`.

    Returns:
      A batch of NumPy arrays [B, length]; padding has segment 0 and weight 0.

    Raises:
      ValueError: when an id is not in the vocabulary, with its offset.
    """
    size = len(stream.tokens)
    first = index * length
    rows = np.zeros((len(index), length + 1), np.int32)
    for row, start in zip(rows, first.tolist(), strict=True):
        part = stream.tokens[start : start + length + 1]
        row[: len(part)] = part
    _check_ids(stream, rows, first)
    documents = stream.documents if segment_attention else stream.documents[:0]
    starts = _document_starts(documents, first, length)
    batch = _as_batch(rows, starts, segment_attention)
    padding = first[:, None] + np.arange(length) >= size - 1
    for values in (batch.tokens, batch.targets, batch.positions, batch.loss_weights):
        values[padding] = 0
    if batch.segment_ids is not None:
        batch.segment_ids[padding] = 0
    return batch


def _document_starts(
    documents: Int64[np.ndarray, "documents"],
    first: Int64[np.ndarray, "B"],
    length: int,
) -> Bool[np.ndarray, "B S"]:
    """Returns True where a document begins inside a row, not at its first token."""
    starts = np.zeros((len(first), length + 1), np.bool_)
    low = np.searchsorted(documents, first, side="right")
    high = np.searchsorted(documents, first + length + 1, side="left")
    counts = np.maximum(high - low, 0)
    row = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts[row, documents[low[row] + within] - first[row]] = True
    return starts


def _as_batch(
    rows: Int[np.ndarray, "B S"],
    starts: Bool[np.ndarray, "B S"],
    segment_attention: bool = True,
) -> Batch:
    """Makes segments at the starts, or none; predicts no token at a start."""
    inside = starts[:, :-1] & segment_attention
    segments = np.cumsum(inside, axis=1, dtype=np.int32) + np.int32(1)
    column = np.arange(inside.shape[1], dtype=np.int32)
    begins = np.where(inside, column, np.int32(0))
    return Batch(
        tokens=np.ascontiguousarray(rows[:, :-1]),
        targets=np.ascontiguousarray(rows[:, 1:]),
        positions=column - np.maximum.accumulate(begins, axis=1),
        segment_ids=segments if segment_attention else None,
        loss_weights=np.where(starts[:, 1:], np.float32(0), np.float32(1)),
    )


def _check_ids(
    stream: TokenStream,
    rows: Int[np.ndarray, "B S"],
    first: Int64[np.ndarray, "B"],
) -> None:
    # XLA silently clamps indices that are out of range.
    if not rows.size or rows.max() < stream.vocab_size:
        return
    row, column = np.argwhere(rows >= stream.vocab_size)[0]
    at = stream.offset + (first[row] + column) % len(stream.tokens)
    raise ValueError(
        f"{stream.name}: token {at} is {rows[row, column]}, but the tokenizer has "
        f"{stream.vocab_size} ids: the file was changed; delete its folder to rebuild "
        "it"
    )
