"""Token ids of a source, encoded once, then mapped from disk.

A cache entry is a folder: `tokens.bin` (little-endian uint16, or uint32 for more than
65,536 ids), `documents.npy` (int64 offset of each document's first token) and
`meta.json`. Each document is followed by the tokenizer's end id, if it has one.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt

from jaxlm.config import DataConfig
from jaxlm.data.disk_cache import build_once, check_unchanged, key_of
from jaxlm.data.documents import read_documents
from jaxlm.data.sources import Source
from jaxlm.terminal.progress import progress_bar
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.kinds import read_saved_tokenizer

FORMAT_VERSION = 1
# Longer documents are encoded in parts, cut after a line: one call on a gigabyte would
# need many times as much memory. The cuts depend on the text only, not on the workers.
PART_CHARACTERS = 4_000_000
# For less text, starting processes costs more time than it saves.
POOL_BYTES = 16 << 20
# Characters in one task of the process pool.
TASK_CHARACTERS = 500_000
# Up to this size, opening verifies the hash of all tokens (a fraction of a second).
CHECKED_BYTES = 64 << 20
SCAN_TOKENS = 16 << 20


@dataclass(frozen=True)
class CachedTokens:
    """The tokens of a source, mapped from disk, read-only."""

    folder: Path
    """Folder of the cache entry."""
    tokens: UInt[np.ndarray, "n"]
    """Ids of all documents, one document after the other."""
    documents: Int64[np.ndarray, "documents"]
    """Offset of each document's first token; the first is 0."""
    content_hash: str
    """SHA-256 (hex) of tokens and documents."""


class _Part(NamedTuple):
    """A part of a document that is encoded in one call."""

    text: str
    where: str
    starts: bool
    """True for the first part of a document."""
    ends: bool
    """True for the last part of a document."""
    done: int
    """Bytes of the source read so far."""


def tokenize_source(
    source: Source, hashes: list[str], tokenizer: Tokenizer, config: DataConfig
) -> CachedTokens:
    """Returns the tokens of a source; encodes them, with progress, if not in the cache.

    Args:
      hashes: their `content_hashes`.
      config: `field`, `invalid_utf8`, `cache_dir` and `workers`.

    Raises:
      ValueError: for anything wrong in the files, and for a damaged cache entry.
    """
    key = key_of(
        "tokens",
        FORMAT_VERSION,
        PART_CHARACTERS,
        [[f.format, f.compression] for f in source.files],
        hashes,
        config.field,
        config.invalid_utf8,
        tokenizer.fingerprint,
        _first_id(tokenizer),
        tokenizer.eos_id,
    )

    def build(folder: Path) -> None:
        _build(folder, source, tokenizer, config)
        check_unchanged(source.files, hashes)

    folder = build_once(config.cache_dir, key, build)
    return open_tokens(folder, tokenizer.vocab_size)


def _first_id(tokenizer: Tokenizer) -> int | None:
    """The id before each document, for models that expect one; else None."""
    return tokenizer.bos_id if tokenizer.adds_bos else None


def open_tokens(folder: Path, vocab_size: int) -> CachedTokens:
    """Maps a cache entry into memory and checks it.

    Raises:
      ValueError: with file and offset, when a file is missing, truncated or changed, or
        an id is not below `vocab_size`.
    """
    meta = _read_meta(folder)
    dtype = _dtype(vocab_size)
    path = folder / "tokens.bin"
    size, expected = _file_size(path), meta["num_tokens"] * dtype.itemsize
    if meta["dtype"] != dtype.str:
        raise _damaged(path, f"ids are {meta['dtype']}, not {dtype.str}")
    if size != expected:
        raise _damaged(path, f"it ends at byte {size}, not at {expected}")
    # As a plain array: slices of numpy's memmap class are slower.
    tokens = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    documents = _open_documents(folder / "documents.npy", meta, len(tokens))
    if size <= CHECKED_BYTES and hashlib.sha256(tokens).hexdigest() != meta["sha256"]:
        _check_ids(path, tokens, vocab_size)
        raise _damaged(path, "its contents do not have the hash in meta.json")
    if size > CHECKED_BYTES:
        _check_ids(path, tokens, vocab_size)
    return CachedTokens(folder, tokens, documents, meta["content_hash"])


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {what}: delete the folder {path.parent} to rebuild it"
    )


def _file_size(path: Path) -> int:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    return path.stat().st_size


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    _file_size(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        keys = {"num_tokens": int, "num_documents": int, "dtype": str}
        keys |= {"sha256": str, "content_hash": str}
        if any(not isinstance(meta[k], kind) for k, kind in keys.items()):
            raise KeyError("a value has the wrong type")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from None
    return meta


def _open_documents(path: Path, meta: dict, num_tokens: int) -> np.ndarray:
    _file_size(path)
    try:
        documents = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from None
    if documents.dtype != np.int64 or documents.shape != (meta["num_documents"],):
        raise _damaged(path, f"it holds {documents.dtype} {documents.shape}")
    if documents[:1].tolist() != [0]:
        raise _damaged(path, "the first document does not begin at token 0")
    steps = np.diff(documents)
    if (steps <= 0).any():
        at = int(np.argmax(steps <= 0)) + 1
        raise _damaged(path, f"document {at} does not begin after the one before it")
    if documents[-1] >= num_tokens:
        raise _damaged(path, "the last document begins after the last token")
    return documents


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    size = len(tokens) * tokens.itemsize
    with progress_bar(f"checking {path}", size) as show:
        for start in range(0, len(tokens), SCAN_TOKENS):
            block = tokens[start : start + SCAN_TOKENS]
            if block.max() >= vocab_size:
                at = start + int(np.argmax(block >= vocab_size))
                raise _damaged(
                    path,
                    f"token {at} (byte {at * tokens.itemsize}) is {tokens[at]}, but "
                    f"the tokenizer has {vocab_size} ids",
                )
            show(start * tokens.itemsize)


def _build(
    folder: Path, source: Source, tokenizer: Tokenizer, config: DataConfig
) -> None:
    total = sum(f.path.stat().st_size for f in source.files)
    starts, num_tokens = array("q"), 0
    dtype = _dtype(tokenizer.vocab_size)
    title = f"tokenizing {source.name}"
    digest = hashlib.sha256()
    # Close the generator on any failure, so that no worker process outlives an error.
    encoded = contextlib.closing(_encode_parts(source, tokenizer, folder, config))
    with (
        open(folder / "tokens.bin", "wb") as out,
        progress_bar(title, total) as show,
        encoded as parts,
    ):
        document_start = 0
        for part, ids in parts:
            if part.starts:
                document_start = num_tokens
            first = _first_id(tokenizer) if part.starts else None
            last = tokenizer.eos_id if part.ends else None
            begin, end = ([] if i is None else [i] for i in (first, last))
            data = np.concatenate([begin, ids, end], dtype=dtype, casting="unsafe")
            out.write(data)
            digest.update(data)
            num_tokens += len(data)
            # Skip a document without any token.
            if part.ends and num_tokens > document_start:
                starts.append(document_start)
            show(part.done)
    if not num_tokens:
        raise ValueError(f"{source.name}: the text has no tokens")
    documents = np.frombuffer(starts, np.int64)
    np.save(folder / "documents.npy", documents)
    documents_hash = hashlib.sha256(documents).hexdigest()
    meta = {
        "num_tokens": num_tokens,
        "num_documents": len(documents),
        "dtype": dtype.str,
        "sha256": digest.hexdigest(),
        "content_hash": key_of(digest.hexdigest(), documents_hash),
        "files": [str(f.path) for f in source.files],
        "tokenizer": tokenizer.fingerprint,
    }
    text = json.dumps(meta, indent=1) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")


def _parts(source: Source, config: DataConfig) -> Iterator[_Part]:
    before = 0
    for file in source.files:
        for text, where, done in read_documents(
            file, config.field, config.invalid_utf8
        ):
            start = 0
            while start < len(text):
                end = min(start + PART_CHARACTERS, len(text))
                if end < len(text):
                    end = text.rfind("\n", start, end) + 1 or end
                origin = f"{where}, from character {start}" if start else where
                ends = end == len(text)
                yield _Part(text[start:end], origin, start == 0, ends, before + done)
                start = end
        before += file.path.stat().st_size


def _encode_parts(
    source: Source, tokenizer: Tokenizer, folder: Path, config: DataConfig
) -> Generator[tuple[_Part, np.ndarray], None, None]:
    """Yields parts with their ids, in order; uses processes where that is faster."""
    parts = _parts(source, config)
    workers = config.workers or _num_cores()
    if workers > 1 and _is_slow(source, tokenizer):
        yield from _encode_in_pool(parts, tokenizer, folder, workers)
        return
    for part in parts:
        try:
            ids = tokenizer.encode(part.text)
        except ValueError as error:
            raise ValueError(f"{part.where}: {error}") from error
        yield part, ids


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_slow(source: Source, tokenizer: Tokenizer) -> bool:
    """False for bytes and characters: encoding them costs less than sending them."""
    if isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        return False
    size = 0
    for file in source.files:
        compressed = file.compression or file.format == ".parquet"
        size += file.path.stat().st_size * (4 if compressed else 1)
    return size >= POOL_BYTES


_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: str) -> None:
    # Only the parent handles Ctrl-C, and it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _worker_tokenizer
    _worker_tokenizer = read_saved_tokenizer(Path(folder))


def _encode_task(texts: list[str]) -> list[np.ndarray]:
    assert _worker_tokenizer is not None
    return [_worker_tokenizer.encode(text) for text in texts]


def _tasks(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    task, size = [], 0
    for part in parts:
        task.append(part)
        size += len(part.text)
        if size >= TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encode_in_pool(
    parts: Iterable[_Part], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[_Part, np.ndarray]]:
    tokenizer.save(folder)
    # Spawn, because a fork of a process with JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (str(folder),))
    waiting: deque[tuple[list[_Part], Future]] = deque()
    finished = False
    try:
        for task in _tasks(parts):
            texts = [part.text for part in task]
            waiting.append((task, pool.submit(_encode_task, texts)))
            # Limit the text in memory.
            if len(waiting) > 2 * workers:
                oldest, future = waiting.popleft()
                yield from zip(oldest, future.result(), strict=True)
        for task, future in waiting:
            yield from zip(task, future.result(), strict=True)
        finished = True
    except BrokenProcessPool as error:
        raise ValueError(
            "a tokenizing process died (out of memory, or the script lacks "
            '`if __name__ == "__main__":`): set data.workers to 1'
        ) from error
    finally:
        if not finished:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        # Wait for workers that are still starting: they read the tokenizer in `folder`.
        pool.shutdown(cancel_futures=True)
