"""Shared by the readers and writers of weight files: stored tensors and limits.

Weight files come from strangers. Readers compare every length with the size of the file
before they allocate anything, and raise a ValueError of one line that names the file,
whatever is wrong with it.
"""

import dataclasses
import math
import os
import stat
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# A model of a trillion parameters has fewer, even with one tensor for each expert.
MAX_TENSORS = 100_000
MAX_DIMS = 32  # NumPy has 64
_MAX_BYTES = 1 << 60
# The system reads less than 2 GiB at once.
_READ_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file, known from the header; its values are not yet read."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Outermost dimension first, as in NumPy."""
    dtype: np.dtype
    """Dtype of the values from `read`; void if the stored type cannot be read."""
    stored_as: str
    """The file's own name for the type: "BF16", "Q4_1"."""
    where: str
    """For messages: `FILE: tensor NAME`."""
    _read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def read(self) -> np.ndarray:
        """Reads the values, again in each call; they are read-only.

        Quantized types are decoded to float32.

        Raises:
          ValueError: for a type that jaxlm cannot read, for damaged values, and if the
            file has become shorter.
        """
        values = self._read()
        assert values.shape == self.shape and values.dtype == self.dtype
        values.flags.writeable = False
        return values


# Shape and dtype of each tensor to write, known before any values are read.
TensorSpecs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
# Returns the values of the tensor of this name.
ReadTensor = Callable[[str], np.ndarray]


class WeightFile:
    """An open file, read where it is asked for.

    Nothing is mapped into memory: when a mapped file is truncated or its disk fails,
    the process dies of SIGBUS.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          ValueError: if it is missing, not a regular file, empty or not readable.
        """
        self.path = path
        try:
            # Checked before opening: opening a pipe would wait for a writer.
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError(f"{path}: not a regular file")
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except OSError as e:
            raise ValueError(f"{path}: cannot be read: {e.strerror}") from e
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        """Bytes that it had when it was opened."""
        if self.size == 0:
            raise ValueError(f"{path}: the file is empty")

    def bytes(self, start: int, stop: int) -> bytes:
        """Returns the bytes in [start, stop), which must be in the file.

        Raises:
          ValueError: if it has changed, or cannot be read.
        """
        return self.values(start, (stop - start,), np.dtype(np.uint8)).tobytes()

    def values(
        self, offset: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        """Returns a new array of the values at `offset`; raises as `bytes`."""
        values = np.empty(shape, dtype)
        data = memoryview(values.reshape(-1).view(np.uint8))
        done = 0
        while done < len(data):
            part = data[done : done + _READ_BYTES]
            try:
                count = os.preadv(self._descriptor, [part], offset + done)
            except OSError as e:
                raise ValueError(f"{self.path}: cannot be read: {e.strerror}") from e
            if not count:
                raise ValueError(
                    f"{self.path}: it ends at byte {offset + done}, and had "
                    f"{self.size} when it was opened: it was changed while it was in "
                    "use"
                )
            done += count
        return values


def number_of_values(shape: tuple[int, ...], where: str) -> int:
    """Returns the product of a shape whose dimensions are integers >= 0.

    Raises:
      ValueError: for more dimensions or values than an array can have.
    """
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{where}: {len(shape)} dimensions, more than {MAX_DIMS}")
    # NumPy rejects dimensions whose product overflows even if another dimension is 0.
    if math.prod(max(d, 1) for d in shape) > _MAX_BYTES // 16:
        raise ValueError(f"{where}: its shape is too large")
    return math.prod(shape)


def check_given(
    values: np.ndarray, where: str, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...]
) -> None:
    """Checks that an array to be written has the announced shape and dtype.

    Raises:
      ValueError: if the shape differs, or the dtype is none of `dtypes`.
    """
    if values.shape != shape or values.dtype not in dtypes:
        names = " or ".join(d.name for d in dtypes)
        raise ValueError(
            f"{where}: to be written as {names} of shape {list(shape)}, but the values "
            f"are {values.dtype.name} of shape {list(values.shape)}"
        )


def write_values(file: BinaryIO, values: np.ndarray) -> None:
    """Appends the bytes of an array in row-major order."""
    # Dtypes of ml_dtypes (bfloat16) do not support the buffer protocol.
    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
