"""What the readers and writers of weight files share: a tensor on disk, and bounds.

A file of weights comes from strangers. Every length in it is compared with the bytes
that are there before anything is allocated, and whatever is wrong with it ends in one
ValueError of one line that names the file.
"""

import dataclasses
import math
import mmap
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Models of a trillion parameters, an expert a tensor, have fewer.
MAX_TENSORS = 100_000
MAX_DIMS = 32  # NumPy has 64
_MAX_BYTES = 1 << 60


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file: known from the file's header, its values not yet read."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Outermost dimension first, as NumPy has it."""
    dtype: np.dtype
    """Of the values that `read` gives; void where the type cannot be read."""
    stored_as: str
    """The file's own name of its type: "BF16", "Q4_1"."""
    where: str
    """FILE: tensor NAME, for messages."""
    _read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def read(self) -> np.ndarray:
        """The values, read-only; where possible a view of the file and no copy.

        The view is valid as long as the file is not shortened. Values of quantized
        types are decoded to float32, anew in each call.

        Raises:
          ValueError: for a type that jaxlm does not read, and for damaged values.
        """
        values = self._read()
        assert values.shape == self.shape and values.dtype == self.dtype
        values.flags.writeable = False
        return values


# For writing: the shape and dtype of each tensor, known before any is read.
TensorSpecs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
# Gives the values of one of them by name.
ReadTensor = Callable[[str], np.ndarray]


def shown(name: Any) -> str:
    """A name from a file, for a message: short, on one line, in quotes if it is odd."""
    if not isinstance(name, str):
        return f"of type {type(name).__name__}"
    short = name if len(name) <= 120 else f"{name[:100]}..."
    return short if short.isprintable() and " " not in short and short else repr(short)


def map_file(path: Path) -> mmap.mmap:
    """Maps a file for reading; its pages are loaded when they are touched.

    Raises:
      ValueError: when it is missing, no regular file, empty or may not be read.
    """
    try:
        # A pipe is not opened: that would wait for a writer.
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
    """The product of a shape whose dimensions are known to be integers >= 0.

    Raises:
      ValueError: for more dimensions, or more values, than an array can have.
    """
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{where}: {len(shape)} dimensions, more than {MAX_DIMS}")
    # NumPy refuses dimensions whose product overflows even if another of them is 0.
    if math.prod(max(d, 1) for d in shape) > _MAX_BYTES // 16:
        raise ValueError(f"{where}: its shape is too large")
    return math.prod(shape)


def view(
    mapped: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """An array over bytes of a mapped file; a copy only where they are not aligned."""
    values = np.ndarray(shape, dtype, buffer=mapped, offset=offset)
    return values if values.flags.aligned else values.copy()


def check_given(
    values: np.ndarray, where: str, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...]
) -> None:
    """Compares an array to be written with what was announced.

    Raises:
      ValueError: when the shape, or all of the dtypes, differ.
    """
    if values.shape != shape or values.dtype not in dtypes:
        names = " or ".join(d.name for d in dtypes)
        raise ValueError(
            f"{where}: to be written as {names} of shape {list(shape)}, but the values "
            f"are {values.dtype.name} of shape {list(values.shape)}"
        )


def write_values(file: BinaryIO, values: np.ndarray) -> None:
    """Appends the bytes of an array in row-major order."""
    # Some dtypes of ml_dtypes (bfloat16) have no buffer of their own.
    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
