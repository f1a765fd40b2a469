"""Shared by the readers and writers of weight files: stored tensors and limits.

Weight files come from strangers. Readers compare every length with the size of the file
before they allocate anything, and raise a ValueError of one line that names the file,
whatever is wrong with it.
"""

import dataclasses
import math
import mmap
import os
import stat
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
        """Returns the values, read-only; a view of the mapped file where possible.

        The view is valid as long as the file is not truncated. Quantized types are
        decoded to float32, again in each call.

        Raises:
          ValueError: for a type that jaxlm cannot read, and for damaged values.
        """
        values = self._read()
        assert values.shape == self.shape and values.dtype == self.dtype
        values.flags.writeable = False
        return values


# Shape and dtype of each tensor to write, known before any values are read.
TensorSpecs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
# Returns the values of the tensor of this name.
ReadTensor = Callable[[str], np.ndarray]


def map_file(path: Path) -> mmap.mmap:
    """Maps a file for reading; pages are loaded when they are touched.

    Raises:
      ValueError: if it is missing, not a regular file, empty or not readable.
    """
    try:
        # Checked before opening: opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path}: not a regular file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{path}: the file is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read: {e.strerror}") from e


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


def view(
    mapped: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Returns an array over bytes of a mapped file; a copy if they are not aligned."""
    values = np.ndarray(shape, dtype, buffer=mapped, offset=offset)
    return values if values.flags.aligned else values.copy()


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
