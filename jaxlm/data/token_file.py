"""Token ids in a file, read whenever they are used."""

import hashlib
import os
import weakref
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from jaxlm.data.disk_cache import DamagedEntry
from jaxlm.terminal.progress import progress_bar

BLOCK_BYTES = 16 << 20


class TokenFile:
    """Ids in a file, as a read-only array: with a length, slices and `np.asarray`.

    Nothing is mapped into memory: when a mapped file is truncated or its disk fails,
    the process dies of SIGBUS. Here each use reads, and raises when the file is not
    what it was when it was opened.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_tokens: int, sha256: str):
        """Opens a file and verifies its hash, with progress.

        Raises:
          DamagedEntry: if it is missing, or has not this size and hash.
        """
        self.dtype = dtype
        self._file = _CheckedFile(path, num_tokens * dtype.itemsize, sha256)
        self._start, self._stop = 0, num_tokens

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> "TokenFile":
        """Returns a part, without reading it."""
        start, stop, step = part.indices(len(self))
        assert step == 1
        view = TokenFile.__new__(TokenFile)
        view.dtype, view._file = self.dtype, self._file
        view._start = self._start + start
        view._stop = max(self._start + stop, view._start)
        return view

    def __array__(
        self, dtype: np.dtype | None = None, copy: bool | None = None
    ) -> Integer[np.ndarray, "n"]:
        """Reads the ids.

        Raises:
          DamagedEntry: if the file has changed since it was opened.
        """
        size = self.dtype.itemsize
        data = self._file.read(self._start * size, self._stop * size)
        return np.frombuffer(data, self.dtype).astype(dtype or self.dtype, copy=False)

    def tolist(self) -> list[int]:
        """Reads the ids as Python integers."""
        return np.asarray(self).tolist()


class _CheckedFile:
    """An open file whose contents have a known hash."""

    def __init__(self, path: Path, size: int, sha256: str):
        self._path, self._size, self._sha256 = path, size, sha256
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DamagedEntry(path, f"it cannot be read ({error.strerror})") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._seen: tuple[int, ...] | None = None
        self._check()

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes in [start, stop)."""
        self._check()
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> bytes:
        parts = []
        while start < stop:
            try:
                part = os.pread(self._descriptor, min(stop - start, BLOCK_BYTES), start)
            except OSError as error:
                raise self._damaged(f"it cannot be read ({error.strerror})") from None
            if not part:
                raise self._damaged(f"it ends at byte {start}, not at {self._size}")
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check(self) -> None:
        """Verifies the hash, unless size and times are those of the last check."""
        status = os.fstat(self._descriptor)
        # Who writes can put the first time back, as rsync does, but not the second.
        now = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if now == self._seen:
            return
        if status.st_size != self._size:
            raise self._damaged(
                f"it ends at byte {status.st_size}, not at {self._size}"
            )
        digest = hashlib.sha256()
        with progress_bar(f"checking {self._path}", self._size) as show:
            for start in range(0, self._size, BLOCK_BYTES):
                digest.update(self._read(start, min(start + BLOCK_BYTES, self._size)))
                show(start)
        if digest.hexdigest() != self._sha256:
            raise self._damaged("its contents do not have the hash in meta.json")
        self._seen = now

    def _damaged(self, what: str) -> DamagedEntry:
        when = "" if self._seen is None else "it was changed while it was in use, and "
        return DamagedEntry(self._path, when + what)
