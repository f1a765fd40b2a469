"""Files and folders that are whole under their name, also after a power cut."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Returns when a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder and makes the new name last through a power cut."""
    source.rename(target)
    sync(target.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Gives a new file to write; it gets the name `path` at the end, if all went well.

    Until then `path` is what it was before, also through a power cut.

    Raises:
      OSError: when it cannot be written; names `path` and the reason.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except OSError as e:
        if e.filename and os.fspath(e.filename) != os.fspath(temporary):
            raise  # of another file, which the caller reads
        raise OSError(e.errno, f"cannot write: {e.strerror}", str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)
