"""Writes and renames that survive a power cut: a name never holds half a file."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file to write, which replaces `path` at the end if nothing failed.

    Until then `path` stays as it was, even through a power cut.

    Raises:
      OSError: if it cannot be written; names `path` and the reason. What is no file
        stays: the system's /dev/null can be replaced too.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "cannot write: it is not a file", str(path))
    # Of its own in each process, also where all have the same number, as in containers.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        # Never through a link that somebody has laid.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except OSError as e:
        if e.filename and os.fspath(e.filename) != os.fspath(temporary):
            raise  # the error of another file, which the caller reads
        raise OSError(e.errno, f"cannot write: {e.strerror}", str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)
