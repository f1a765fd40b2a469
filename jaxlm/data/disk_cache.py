"""A folder of derived files, each named by a hash of everything that it depends on.

An entry never changes, so a hit needs no check of age: edited text has another hash,
and therefore another key.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import resource
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.config import DataConfig
from jaxlm.data.sources import TextFile
from jaxlm.files.durable import sync
from jaxlm.files.user_cache import user_cache
from jaxlm.terminal.progress import progress_bar

# Up to this size, hashing all bytes at every start is fast enough.
FULL_HASH_BYTES = 256 << 20
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 1 << 20
# A folder is locked while it is built, soon after it was made.
UNLOCKED_SECONDS = 60.0
_BUILDING, _LOCK = ".building-", ".lock"
_MADE = re.compile(re.escape(_BUILDING) + "[a-z0-9_]{8}")
# A file of an entry, with the key under which it was built.
_KEY = "key"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")

logger = logging.getLogger(__name__)


class DamagedEntry(ValueError):
    """A file of the cache is not as it was built."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path} is damaged: {what}")


def cache_root(cache_dir: str | Path | None) -> Path:
    """Returns `cache_dir`, or by default jaxlm/tokens in the user's cache folder.

    Raises:
      OSError: if the user has no home folder.
    """
    if cache_dir is not None:
        return Path(os.path.expanduser(cache_dir))
    return user_cache() / "tokens"


@functools.cache
def _temporary_root(path: str, reason: str) -> tempfile.TemporaryDirectory:
    """The cache of this process alone, deleted at its end, as `path` cannot be used."""
    logger.warning(
        "tokens are not kept: %s (%s); the next start prepares the text again",
        *(path, reason),
    )
    return tempfile.TemporaryDirectory(prefix="jaxlm-tokens-")


def key_of(*values: Any) -> str:
    """SHA-256 (hex) of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode("utf-8")).hexdigest()


def content_hashes(files: Sequence[TextFile]) -> list[str]:
    """Hashes the contents of each file.

    Up to 256 MiB, it is the SHA-256 of all bytes, so every change is noticed. For a
    larger file, it covers the size, the modification time in nanoseconds, and 64 blocks
    of 1 MiB spread over the file: a change in place, between these blocks, that also
    resets the time goes unnoticed.
    """
    sizes = [_read(file.path, os.path.getsize) for file in files]
    total = sum(min(size, FULL_HASH_BYTES) for size in sizes)
    hashes, done = [], 0
    with progress_bar("reading the text to see whether it changed", total) as show:
        for file, size in zip(files, sizes, strict=True):
            hash_file = _full_hash if size <= FULL_HASH_BYTES else _sampled_hash
            hashes.append(_read(file.path, hash_file))
            done += min(size, FULL_HASH_BYTES)
            show(done)
    return hashes


def check_unchanged(files: Sequence[TextFile], hashes: Sequence[str]) -> None:
    """Raises ValueError for a file that has changed since it was hashed.

    Otherwise text read during a change would be stored under the hash of the old text.
    """
    for file, before, now in zip(files, hashes, content_hashes(files), strict=True):
        if before != now:
            raise ValueError(
                f"{file.path}: the file was changed while it was read: start again "
                "when it is complete"
            )


def _read(path: Path, function: Callable[[Path], Any]) -> Any:
    try:
        return function(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _full_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sampled_hash(path: Path) -> str:
    status = os.stat(path)
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    last = max(status.st_size - BLOCK_BYTES, 0)
    with open(path, "rb") as stream:
        for block in range(SAMPLED_BLOCKS):
            stream.seek(last * block // (SAMPLED_BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def read_or_build(
    config: DataConfig,
    what: str,
    key: str,
    build: Callable[[Path], None],
    read: Callable[[Path], T],
) -> T:
    """Returns what `read` makes of the folder of a key, and builds it if it is missing.

    An entry that is damaged, or a copy of one with another key, is built again, with a
    warning. One that this user may not read is another user's, and is left alone.

    Args:
      config: `cache_dir`, and `old_tokens`, with which nothing is built or removed.
      what: what the entry is made of, for messages.
      read: raises DamagedEntry.

    Raises:
      ValueError: as `build_once`, if the entry may not be read, if a new one is damaged
        too, and with `old_tokens` if the entry is missing or damaged.
    """

    def build_named(work: Path) -> None:
        build(work)
        (work / _KEY).write_text(key)

    def read_own(folder: Path) -> T:
        _check_key(folder / _KEY, key)
        return read(folder)

    if config.old_tokens:
        return _read_old(cache_root(config.cache_dir), what, key, read_own)
    cache_dir = config.cache_dir
    folder = build_once(cache_dir, key, build_named)
    if forbidden := _forbidden(folder):
        raise ValueError(f"{forbidden}, or set data.cache_dir to a folder of your own")
    try:
        return read_own(folder)
    except DamagedEntry as error:
        logger.warning("%s: it is made again", error)
        try:
            _remove(folder)
        except OSError as failed:
            raise ValueError(
                f"{error}, and it cannot be replaced ({failed.strerror}): delete "
                f"{folder}, or set data.cache_dir"
            ) from None
    return read_own(build_once(cache_dir, key, build_named))


def _forbidden(folder: Path) -> str | None:
    """Returns what to say of an entry that this user may not read; else None."""
    try:
        for path in folder.iterdir():
            # Somebody may have put a pipe there, which would be waited for.
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except PermissionError as error:
        return (
            f"{error.filename} cannot be read ({error.strerror}) and is left alone: "
            f"let its owner share the tokens (chmod -R a+rX {folder})"
        )
    except OSError:
        pass  # It is missing or damaged, which is found when it is read.
    return None


def _check_key(path: Path, key: str) -> None:
    """Raises DamagedEntry for an entry of another key, which somebody has copied."""
    try:
        written = path.read_bytes()
    except FileNotFoundError:  # of an earlier version
        return
    except OSError as error:
        raise DamagedEntry(path, f"it cannot be read ({error.strerror})") from None
    if written != key.encode():
        raise DamagedEntry(path, "the entry is a copy of that of another text")


def _read_old(root: Path, what: str, key: str, read: Callable[[Path], T]) -> T:
    """Reads an entry that cannot be made again, as the text may have changed."""
    if forbidden := _forbidden(root / key):
        raise ValueError(
            f"data.old_tokens: {forbidden}, restore the text, or start a new run"
        )
    if not (root / key).is_dir():
        raise ValueError(
            f"data.old_tokens: those of {what} are no longer in {root}: restore the "
            "text, or start a new run"
        )
    try:
        return read(root / key)
    except DamagedEntry as error:
        # It may be readable at the next start, as after an error of the disk.
        raise ValueError(
            f"data.old_tokens: {error}; it is kept, as it cannot be made again from "
            "another text: start again, restore this file or the text, or start a new "
            "run"
        ) from None


def build_once(
    cache_dir: str | Path | None, key: str, build: Callable[[Path], None]
) -> Path:
    """Returns the folder of a key in the cache, and builds it first if it is missing.

    `build` fills a temporary folder next to it, which is renamed once it is complete
    and on disk. When two processes build at once, both succeed and one result is kept.

    Args:
      cache_dir: the cache folder; created, for this user only, if missing. In one that
        is there, users share what their umask lets them. None: that of the user, or one
        of this process, with a warning, where that cannot be used.

    Raises:
      ValueError: when the folder `cache_dir` cannot be written, or the disk is full.
    """
    try:
        root = cache_root(cache_dir)
        folder = root / key
        if folder.is_dir():
            return folder
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkdtemp creates a folder that only this user can enter; a cache may be shared.
        work = root / f"{_BUILDING}{secrets.token_hex(4)}"
        work.mkdir()
        _remove_abandoned(root, work.stat().st_mtime)
    except OSError as error:
        if cache_dir is None:
            temporary = _temporary_root(error.filename, error.strerror)
            return build_once(temporary.name, key, build)
        raise ValueError(
            f"the cache folder {cache_dir} cannot be written ({error.strerror}): set "
            "data.cache_dir to a folder that you can write"
        ) from None
    try:
        with _locked(work), _disk_may_be_full(root):
            build(work)
            for file in work.rglob("*"):
                sync(file)
        sync(work)
        _publish(work, folder)
        sync(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Shows that a folder is being built; the system ends it with the process."""
    lock = work / _LOCK
    with open(lock, "wb") as file:
        # Without locks, nobody takes it for abandoned.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        lock.unlink()


@contextlib.contextmanager
def _disk_may_be_full(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # NumPy gives no number when it cannot write all of an array.
        if error.errno is not None and error.errno not in _DISK_FULL:
            raise
        free = shutil.disk_usage(root).free
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if error.errno == errno.EFBIG or (error.errno is None and 0 <= limit < free):
            raise ValueError(
                f"the cache folder {root} takes no file of this size: raise the limit "
                "of this process (ulimit -f), or set data.cache_dir to a folder on "
                "another disk; tokens need 2 or 4 bytes each"
            ) from None
        raise ValueError(
            f"the cache folder {root} cannot be written ({error.strerror or error}; "
            f"{free:,} bytes are free): make room, or set data.cache_dir to a folder "
            "on another disk; tokens need 2 or 4 bytes each"
        ) from None


def _publish(work: Path, folder: Path) -> None:
    try:
        os.replace(work, folder)
    except OSError as error:
        # Another process finished first: its folder is as good as ours.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not folder.is_dir():
            raise


def _remove(folder: Path) -> None:
    """Removes an entry, by a rename first: a name never holds half an entry."""
    doomed = tempfile.mkdtemp(prefix=_BUILDING, dir=folder.parent)
    try:
        # Another process may do the same.
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, doomed)
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_abandoned(root: Path, now: float) -> None:
    """Removes what processes that were killed have left half built.

    Args:
      now: the time of a file that was just made. The clock of a shared disk is not that
        of this machine, by which a folder that is being built may look old.
    """
    for folder in root.glob(_BUILDING + "*"):
        if not _MADE.fullmatch(folder.name):
            continue  # of a person
        # Another process may rename or remove its folder at any moment.
        with contextlib.suppress(OSError):
            is_old = now - folder.stat().st_mtime > UNLOCKED_SECONDS
            if is_old and not _is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_locked(folder: Path) -> bool:
    if not (folder / _LOCK).exists():
        return False
    with open(folder / _LOCK, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
