"""The ids of the documents of a source: encodes them in parts, in several processes."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.documents import DocumentPart, read_documents
from jaxlm.data.sources import Source
from jaxlm.terminal.printable import shown
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.kinds import read_saved_tokenizer

_log = logging.getLogger(__name__)
# For less text, starting processes costs more time than it saves.
POOL_BYTES = 16 << 20
# Characters in one task of the process pool.
TASK_CHARACTERS = 500_000


def encode_source(
    source: Source, tokenizer: Tokenizer, folder: Path, config: DataConfig
) -> Generator[tuple[DocumentPart, np.ndarray], None, None]:
    """Yields parts with their ids, in order; uses processes where that is faster.

    Args:
      folder: gets the files of the tokenizer, if processes read them.
      config: `field`, `invalid_utf8` and `workers`.

    Raises:
      ValueError: for anything wrong in the files, with file and line, and when a
        process dies.
    """
    parts = document_parts(source, tokenizer, config)
    workers = config.workers or _num_cores()
    if workers > 1 and _is_slow(source, tokenizer):
        yield from _encode_in_pool(parts, tokenizer, folder, workers)
        return
    for part in parts:
        yield part, _encode(tokenizer, part.text, part.where)


def document_parts(
    source: Source, tokenizer: Tokenizer, config: DataConfig
) -> Iterator[DocumentPart]:
    """Yields the documents of all files, whose `done` counts the bytes of all.

    A line tells of the first special token that a text spells out: other programs write
    them when they format a text for a model, or join documents to one file.
    """
    before, spelled = 0, None
    for file in source.files:
        for part in read_documents(file, config.field, config.invalid_utf8):
            if not spelled and (spelled := tokenizer.first_special(part.text)):
                _log.warning(
                    "%s: the text has %s, which is read as these characters: no text "
                    "becomes a special token, and a document ends where its file, its "
                    "line of JSON or its row does",
                    *(part.where, shown(spelled)),
                )
            yield part._replace(done=before + part.done)
        before += file.path.stat().st_size


def _encode(tokenizer: Tokenizer, text: str, where: str) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _worker_tokenizer
    _worker_tokenizer = read_saved_tokenizer(Path(folder))


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for the next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_task(parts: list[tuple[str, str]]) -> list[np.ndarray]:
    assert _worker_tokenizer is not None
    return [_encode(_worker_tokenizer, text, where) for text, where in parts]


def _tasks(parts: Iterable[DocumentPart]) -> Iterator[list[DocumentPart]]:
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
    parts: Iterable[DocumentPart], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[DocumentPart, np.ndarray]]:
    tokenizer.save(folder)
    # Spawn, because a fork of a process with JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (str(folder),))
    waiting: deque[tuple[list[DocumentPart], Future]] = deque()
    finished = False

    def submit(task: list[DocumentPart]) -> Future:
        texts = [(part.text, part.where) for part in task]
        try:
            return pool.submit(_encode_task, texts)
        except OSError as error:
            # Python 3.11 closes its pipe before it marks the pool as broken.
            raise BrokenProcessPool(str(error)) from error

    def oldest() -> Iterator[tuple[DocumentPart, np.ndarray]]:
        task, future = waiting[0]
        ids = future.result()
        waiting.popleft()
        return zip(task, ids, strict=True)

    try:
        for task in _tasks(parts):
            waiting.append((task, submit(task)))
            # Limit the text in memory.
            if len(waiting) > 2 * workers:
                yield from oldest()
        while waiting:
            yield from oldest()
        finished = True
    except BrokenProcessPool as error:
        near = waiting[0][0][0].where if waiting else "the start"
        raise ValueError(
            f"a tokenizing process died, at or after {near} (out of memory, or the "
            'script lacks `if __name__ == "__main__":`): nothing was kept; set '
            "data.workers to 1, which needs the least memory, and start again"
        ) from error
    finally:
        if not finished:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        # Wait for workers that are still starting: they read the tokenizer in `folder`.
        pool.shutdown(cancel_futures=True)
