"""Reads files that are small, unless somebody has laid another one in their place."""

import errno
import os
from pathlib import Path

_BLOCK_BYTES = 16 << 20


def read_bounded(path: Path, most: int) -> bytes:
    """Returns the contents of a file of at most `most` bytes.

    Raises:
      OSError: also for a larger file: a hole of a terabyte takes no space on a disk,
        and a device (/dev/zero) may have no end.
    """
    with path.open("rb") as file:
        size, parts = os.fstat(file.fileno()).st_size, []
        while size <= most:
            parts.append(file.read(_BLOCK_BYTES))
            if not parts[-1]:
                return b"".join(parts)
            size = max(size, sum(map(len, parts)))
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
