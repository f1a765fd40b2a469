"""Writes and renames that survive a power cut: a name never holds half a file."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxlm.files.beginnings import begins

# What is written is locked soon after it was made.
_UNLOCKED_SECONDS = 60.0


def sync(path: Path, *, strict: bool = False) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk.

    Some file systems (older CIFS, vboxsf, 9p) cannot wait for a folder, which is an
    error only if `strict`.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        cannot = error.errno in (errno.EINVAL, errno.ENOTSUP) and path.is_dir()
        if strict or not cannot:
            raise OSError(*error.args, str(path)) from None
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder, and waits until the new name is on the disk."""
    source.rename(target)
    sync(target.parent)


@contextlib.contextmanager
def replacing(path: Path, earlier: bytes | None = b"") -> Iterator[BinaryIO]:
    """Yields a new file to write, which replaces `path` at the end if nothing failed.

    Until then `path` stays as it was, even through a power cut. The new file may be
    read by those who may read the old one.

    Args:
      earlier: how a file begins that may be replaced, if it is not empty; another one,
        which somebody may have put there meanwhile, stays. None: any stays.

    Raises:
      OSError: if it cannot be written; names `path` and the reason. What is no file
        stays: the system's /dev/null can be replaced too.
    """
    _check_replaceable(path, earlier)
    if os.path.isdir(path):  # Renaming would replace a link to one.
        raise OSError(errno.EISDIR, "cannot write: Is a directory", str(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "cannot write: it is not a file", str(path))
    # Of its own in each process, also where all have the same number, as in containers.
    temporary = _new_name(path)
    try:
        # Never through a link that somebody has laid.
        with temporary.open("xb") as file:
            _lock(file.fileno())
            if path.is_file() and not path.is_symlink():
                mode = stat.S_IMODE(path.stat().st_mode) & 0o777
                if mode != stat.S_IMODE(os.fstat(file.fileno()).st_mode):
                    os.fchmod(file.fileno(), mode | stat.S_IWUSR)
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_replaceable(path, earlier)
        rename(temporary, path)
    except OSError as e:
        if e.filename and os.fspath(e.filename) != os.fspath(temporary):
            raise  # the error of another file, which the caller reads
        raise OSError(e.errno, f"cannot write: {e.strerror}", str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)


def _check_replaceable(path: Path, earlier: bytes | None) -> None:
    if earlier is None and os.path.lexists(path):
        raise OSError(errno.EEXIST, "it is there already, and stays", str(path))
    if earlier and not begins(path, earlier):
        words = "it is there, and is no such file of jaxlm: it stays"
        raise OSError(errno.EEXIST, words, str(path))


def check_room_for(path: Path) -> None:
    """Makes the folder of a file that is written later, after long work.

    Raises:
      OSError: if no file can be made there; names `path` and the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".tmp-", dir=path.parent):
            pass
    except OSError as e:
        raise OSError(e.errno, f"cannot write: {e.strerror}", str(path)) from e


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder to fill, which is named `path` at the end if nothing failed.

    Raises:
      OSError: if it cannot be written, or something has taken the name; names a file
        by where it would be in `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_name(path)
    try:
        temporary.mkdir()
        with _opened(temporary) as descriptor:
            _lock(descriptor)
            yield temporary
            rename(temporary, path)
    except OSError as e:
        name = Path(os.fsdecode(e.filename or temporary))
        if not name.is_relative_to(temporary):
            raise
        name = path / name.relative_to(temporary)
        raise OSError(e.errno, e.strerror, str(name)) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_locked(path: Path) -> bool:
    """Whether a process has a file open that `replacing` has written.

    Not on a file system without locks, and not if the file cannot be opened.
    """
    with contextlib.suppress(OSError), _opened(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def remove_abandoned(path: Path) -> None:
    """Removes what killed processes have left of `replacing` or `new_folder`.

    What cannot be removed, or on a file system without locks told from what is being
    written, stays.
    """
    found = list(path.parent.glob(f"{_prefix(path)}*"))
    if not found:
        return
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as new:
        now = os.fstat(new.fileno()).st_mtime  # by the clock of the disk
        for left in found:
            with contextlib.suppress(OSError), _opened(left) as descriptor:
                if now - os.fstat(descriptor).st_mtime < _UNLOCKED_SECONDS:
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()


def _new_name(path: Path) -> Path:
    return path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}")


def _prefix(path: Path) -> str:
    return f".tmp-of-{zlib.crc32(os.fsencode(path.name)):08x}-"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Shows that something is being written; the system ends it with the process."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
