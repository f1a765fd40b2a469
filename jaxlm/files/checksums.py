"""Checksums of files that a library writes and reads without looking at them.

The compile cache of JAX is one: it compresses a program without a checksum, so that one
flipped bit in it can become machine code, which ends the process with SIGILL or gives
other numbers.
"""

import contextlib
import os
import zlib
from pathlib import Path

NAME = "checksums"


class Checksums:
    """The CRC-32 of each file of a folder, in a file beside them.

    Several processes may use one folder: lines are appended, and the last one of a name
    counts.
    """

    def __init__(self, folder: Path, suffix: str):
        """Takes the files of `folder` whose names end with `suffix`."""
        self._folder, self._suffix = folder, suffix
        self._known: set[str] = set()

    def remove_damaged(self) -> int:
        """Deletes each file that is not the one that was recorded.

        Returns:
          The number of damaged files. Those that were never recorded, since their
          process was killed, are deleted too, but not counted.
        """
        recorded, damaged = {}, 0
        with contextlib.suppress(FileNotFoundError):
            lines = (self._folder / NAME).read_bytes().splitlines()
            parts = (line.rpartition(b" ") for line in lines)
            recorded = {name: checksum for name, _, checksum in parts}
        for path in self._folder.glob(f"*{self._suffix}"):
            checksum = recorded.get(path.name.encode())
            if checksum == _crc(path):
                self._known.add(path.name)
                continue
            damaged += checksum is not None
            path.unlink(missing_ok=True)  # Another process may do the same.
        return damaged

    def record_new(self) -> None:
        """Records the files that were not there before."""
        # Called after each compiled program, of a folder with perhaps thousands.
        names, lines = set(os.listdir(self._folder)) - self._known, []
        for name in sorted(name for name in names if name.endswith(self._suffix)):
            with contextlib.suppress(FileNotFoundError):
                lines.append(name.encode() + b" " + _crc(self._folder / name) + b"\n")
        if lines:
            with open(self._folder / NAME, "ab", buffering=0) as file:
                file.write(b"".join(lines))
        self._known |= names


def _crc(path: Path) -> bytes:
    return b"%08x" % zlib.crc32(path.read_bytes())
