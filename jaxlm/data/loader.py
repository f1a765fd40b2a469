"""Batches of a `DataConfig`: which rows, in which order, on which devices."""

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Int64

from jaxlm.config import DataConfig
from jaxlm.data.disk_cache import (
    DamagedEntry,
    check_unchanged,
    key_of,
    read_or_build,
)
from jaxlm.data.documents import read_documents
from jaxlm.data.order import RowOrder
from jaxlm.data.packing import (
    TokenStream,
    epoch_offset,
    eval_rows,
    split_stream,
    train_rows,
)
from jaxlm.data.text_record import TextRecord, current_texts
from jaxlm.data.tokens import tokenize_source
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.kinds import build_tokenizer, needs_text, read_saved_tokenizer
from jaxlm.tokenizers.training import cut_passages
from jaxlm.types import Batch

# Increase it whenever the same config and seed would give other batches than before.
ORDER_VERSION = 1
_ALL_ROWS = slice(None)
_BLOCK_TOKENS = 8 << 20
_SMALL = 100  # a hundredth of all bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Rows of tokens in a fixed order; `open_dataset` opens one."""

    tokenizer: Tokenizer
    """The tokenizer of the ids."""
    seed: int
    """Seed of the order of rows and of where rows begin."""
    sequence_length: int
    """Number of tokens in a row, T."""
    segment_attention: bool
    """Whether the documents of a row are separate segments."""
    train: tuple[TokenStream, ...]
    """Training tokens, a stream for each entry of data.path."""
    held_out: tuple[TokenStream, ...]
    """Tokens held out for evaluation, likewise."""
    order: RowOrder
    """Order of the rows."""
    fingerprint: str
    """SHA-256 (hex) of everything that determines contents and order."""
    texts: tuple[TextRecord, ...]
    """The files that the tokens were made of, one record for each entry of data.path.
    """

    @property
    def num_train_tokens(self) -> int:
        """Number of training tokens in all sources."""
        return sum(len(s.tokens) for s in self.train)

    def train_batch(self, step: int, batch_size: int, rows: slice = _ALL_ROWS) -> Batch:
        """Returns the batch of a step: a pure function of (seed, step, batch_size).

        Args:
          step: from 0.
          batch_size: rows of the whole batch, over all processes.
          rows: the part of these rows to return.

        Returns:
          NumPy arrays [B, T] of those rows.

        Raises:
          ValueError: when an id on disk is not in the vocabulary.
        """
        index = np.arange(batch_size, dtype=np.int64)[rows] + step * batch_size
        source, epoch, row = self.order.rows(index)
        length = self.sequence_length
        offsets = [epoch_offset(self.seed, e, length) for e in epoch.tolist()]
        first = row * length + np.asarray(offsets, np.int64)
        return self._gather(self.train, source, first, train_rows)

    def num_eval_batches(self, batch_size: int) -> int:
        """Number of batches in one pass over the held-out text."""
        return -(-int(self._eval_starts[-1]) // batch_size)

    def eval_batch(
        self, number: int, batch_size: int, rows: slice = _ALL_ROWS
    ) -> Batch:
        """Returns one batch of the pass over the held-out text; the last one is padded.

        Args:
          number: in [0, num_eval_batches(batch_size)).
          batch_size: rows of the whole batch, over all processes.
          rows: the part of these rows to return.

        Returns:
          NumPy arrays [B, T]; padding has segment 0 and weight 0.
        """
        index = np.arange(batch_size, dtype=np.int64)[rows] + number * batch_size
        starts = self._eval_starts
        # Rows past the end count as rows of the last source, which pads them.
        source = np.searchsorted(starts[1:-1], index, side="right")
        return self._gather(self.held_out, source, index - starts[source], eval_rows)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields the held-out text of all sources, in order, as NumPy arrays."""
        for number in range(self.num_eval_batches(batch_size)):
            yield self.eval_batch(number, batch_size)

    @cached_property
    def eval_bytes_per_token(self) -> float:
        """Average number of UTF-8 bytes of a held-out target.

        Mean loss / ln 2 / this = bits per byte, which does not depend on the tokenizer.

        Raises:
          ValueError: when nothing is held out.
        """
        sizes = np.asarray([len(b) for b in self.tokenizer.token_bytes], np.int64)
        counts = np.zeros(len(sizes), np.int64)
        for stream in self.held_out:
            size = len(stream.tokens)
            first = stream.documents
            if not self.segment_attention:
                first = np.zeros(min(size, 1), np.int64)
            for start in range(0, size, _BLOCK_TOKENS):
                block = np.asarray(stream.tokens[start : start + _BLOCK_TOKENS])
                low, high = np.searchsorted(first, [start, start + len(block)])
                counts += np.bincount(block, minlength=len(sizes))
                skipped = block[first[low:high] - start]
                counts -= np.bincount(skipped, minlength=len(sizes))
        num_bytes, num_targets = int(counts @ sizes), int(counts.sum())
        if not num_targets:
            raise ValueError(
                "no text is held out for evaluation: set data.holdout_fraction above 0"
            )
        return num_bytes / num_targets

    @cached_property
    def _eval_starts(self) -> Int64[np.ndarray, "sources_and_1"]:
        counts = [s.num_eval_rows(self.sequence_length) for s in self.held_out]
        return np.cumsum([0, *counts], dtype=np.int64)

    def _gather(
        self,
        streams: tuple[TokenStream, ...],
        source: np.ndarray,
        index: np.ndarray,
        make_rows: Callable[..., Batch],
    ) -> Batch:
        """Collects rows of several sources, in the order of `source`."""
        choices = (self.sequence_length, self.segment_attention)
        if len(streams) == 1 or not len(source):
            return make_rows(streams[0], index, *choices)
        chosen = [np.flatnonzero(source == n) for n in range(len(streams))]
        parts = [
            make_rows(stream, index[rows], *choices)
            for stream, rows in zip(streams, chosen, strict=True)
            if len(rows)
        ]
        unsort = np.argsort(np.concatenate(chosen))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[unsort], *parts)


def open_dataset(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    seed: int,
    began: Sequence[TextRecord] | None = None,
) -> Dataset:
    """Opens the texts of a config; the first time, reads and tokenizes them.

    Args:
      tokenizer: that of a resumed run or a checkpoint; None builds the config's.
      seed: determines the order.
      began: the texts when the run began, of which none may have changed.

    Raises:
      ValueError: for anything wrong with the texts, the tokenizer or the cache, and
        for a source that is shorter than a row.
    """
    texts = current_texts(config, began)
    sources = [text.source for text in texts]
    _warn_of_shared_text(texts)
    if tokenizer is None:
        tokenizer = _tokenizer_of(config, texts)
    streams, contents = [], []
    for source, text in zip(sources, texts, strict=True):
        cached = tokenize_source(source, text.hashes, tokenizer, config)
        name = f"{source.name} ({cached.folder / 'tokens.bin'})"
        ids = (cached.tokens, cached.documents, tokenizer.vocab_size)
        streams.append(split_stream(TokenStream(name, *ids), config.holdout_fraction))
        contents.append(cached.content_hash)
    train, held_out = zip(*streams, strict=True)
    length = config.sequence_length
    num_rows = [stream.num_rows(length) for stream in train]
    shares = config.weights or tuple(map(float, num_rows))
    for source, stream, share in zip(sources, train, shares, strict=True):
        is_used = share or not config.weights
        if is_used and len(stream.tokens) <= length:
            raise ValueError(
                f"{source.name}: {len(stream.tokens)} training tokens (the last "
                f"{config.holdout_fraction:.0%} is held out) are too few for a row of "
                f"data.sequence_length {length} + 1; add text or lower "
                "data.sequence_length"
            )
    order = RowOrder(num_rows, shares, seed)
    # The first rows change the fingerprint, should Grain's shuffle ever change.
    probe = [values.tolist() for values in order.rows(np.arange(16, dtype=np.int64))]
    choices = [seed, length, config.holdout_fraction, config.segment_attention]
    fingerprint = key_of(
        ORDER_VERSION, choices, contents, tokenizer.fingerprint, order.units, probe
    )
    return Dataset(
        tokenizer,
        seed,
        length,
        config.segment_attention,
        train,
        held_out,
        order,
        fingerprint,
        texts,
    )


def _warn_of_shared_text(texts: Sequence[TextRecord]) -> None:
    """Warns of files of equal contents: one may be held out, and its copy trained on.

    A few small ones, such as licenses, do not matter.
    """
    first: dict[str, tuple[TextRecord, Path]] = {}
    copies: list[tuple[int, Path, str, Path, str]] = []
    # Entries that are wholly equal hold out the same.
    for text in {text.hashes: text for text in reversed(texts)}.values():
        files = zip(text.source.files, text.sizes, text.hashes, strict=True)
        for file, size, digest in files:
            if digest in first:
                other, path = first[digest]
                names = text.source.name, path, other.source.name
                copies.append((size, file.path, *names))
            first.setdefault(digest, (text, file.path))
    total = sum(sum(text.sizes) for text in texts)
    if sum(size for size, *_ in copies) * _SMALL > total:
        logger.warning(
            "data.path: %s (of %s) has the contents of %s (of %s)%s: what is held out "
            "of one may be trained on in the other, so the held-out loss is too low",
            *max(copies)[1:],
            f", and {len(copies) - 1} more are copies" if len(copies) > 1 else "",
        )


def _tokenizer_of(config: DataConfig, texts: Sequence[TextRecord]) -> Tokenizer:
    """Returns the config's tokenizer; one made from the text is kept in the cache."""
    if not needs_text(config):
        return build_tokenizer(config, ())
    choices: list[str | int] = [config.tokenizer]
    if config.tokenizer != "chars":
        choices.append(config.tokenizer_vocab_size)
    if config.tokenizer == "sentencepiece":
        choices.append(config.tokenizer_algorithm)
    kinds = [[f.format, f.compression] for t in texts for f in t.source.files]
    hashes = [list(text.hashes) for text in texts]
    key = key_of(
        "tokenizer", 1, choices, kinds, hashes, config.field, config.invalid_utf8
    )

    def parts() -> Iterator[tuple[str, bool]]:
        for text in texts:
            for file in text.source.files:
                for part in read_documents(file, config.field, config.invalid_utf8):
                    yield part.text, part.ends

    def build(work: Path) -> None:
        build_tokenizer(config, cut_passages(parts())).save(work)
        for text in texts:
            check_unchanged(text.source.files, text.hashes)

    def read(folder: Path) -> Tokenizer:
        try:
            return read_saved_tokenizer(folder)
        except ValueError as error:
            raise DamagedEntry(folder, str(error)) from error

    return read_or_build(config, "the tokenizer", key, build, read)


def place(
    build: Callable[[slice], Batch],
    shape: tuple[int, int],
    sharding: Sharding | None,
) -> Batch:
    """Puts a batch on devices; each process builds only the rows that its devices hold.

    Args:
      build: returns rows of the batch, such as `partial(dataset.eval_batch, 0, B)`.
      shape: (B, T) of the whole batch, over all processes.
      sharding: a `NamedSharding` of arrays [B, T]. Any other sharding, or None for the
        default device, gets the whole batch from this process.

    Raises:
      ValueError: when the batch does not divide evenly over the devices.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(build(_ALL_ROWS), sharding)
    try:
        indices = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as error:
        raise ValueError(
            f"a batch of {shape[0]} rows of {shape[1]} tokens cannot be cut into equal "
            f"parts on the mesh {dict(sharding.mesh.shape)} by {sharding.spec}: change "
            "train.batch_size, data.sequence_length or the mesh"
        ) from error
    spans = [index[0].indices(shape[0]) for index in indices if index]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    local = build(slice(low, high))

    def whole(leaf: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return leaf[start - low : stop - low, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(whole, local)


def batches(
    dataset: Dataset,
    batch_size: int,
    start_step: int = 0,
    sharding: Sharding | None = None,
    prefetch: int = 2,
    batch_of: Callable[[int], int] | None = None,
) -> Iterator[Batch]:
    """Yields the batches of steps `start_step`, `start_step + 1`, ... without end.

    Args:
      batch_size: rows of a batch, over all processes.
      start_step: step of the first batch.
      sharding: see `place`.
      prefetch: batches that a thread prepares in advance; 0 builds each on demand. The
        batches are the same.
      batch_of: returns the number of the batch of a step, both from 1; None: the same.

    Raises:
      ValueError: at the batch for which `Dataset.train_batch` raises it.
    """
    shape = (batch_size, dataset.sequence_length)

    def make(step: int) -> Batch:
        number = step if batch_of is None else batch_of(step + 1) - 1
        build = partial(dataset.train_batch, number, batch_size)
        return place(build, shape, sharding)

    if not prefetch:
        step = start_step
        while True:
            yield make(step)
            step += 1
    ready: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
    stop = threading.Event()
    thread = threading.Thread(
        target=_fill, args=(ready, stop, make, start_step), daemon=True, name="batches"
    )

    def close() -> None:
        stop.set()
        thread.join()

    # A thread inside JAX could crash the interpreter while it exits.
    atexit.register(close)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        atexit.unregister(close)
        close()


def _fill(
    ready: queue.Queue, stop: threading.Event, make: Callable[[int], Batch], step: int
) -> None:
    """Puts batches, or the error that ends them, into a queue until `stop` is set."""
    while not stop.is_set():
        try:
            item = make(step)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        step += 1
