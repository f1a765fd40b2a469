"""The GGUF format of llama.cpp, and how a file is read, within bounds.

Source: docs/gguf.md of github.com/ggml-org/ggml. A file is a magic number, a version,
the numbers of tensors and of keys, the keys with typed values, the names, dimensions,
types and offsets of the tensors, padding, and the data. Numbers are little-endian, and
the innermost dimension comes first.
"""

import dataclasses
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.checkpoint.gguf.gguf_blocks import (
    DECODERS,
    TENSOR_TYPES,
    TensorType,
    dequantize,
)
from jaxlm.checkpoint.tensor_file import (
    BFLOAT16,
    FLOAT32,
    MAX_TENSORS,
    StoredTensor,
    WeightFile,
    number_of_values,
)
from jaxlm.terminal.printable import shown

MAX_KEYS = 100_000
MAX_DIMS = 4
MAX_STRING_BYTES = 64 << 20
MAX_ALIGNMENT = 1 << 20
# For keys, values and the list of tensors; the largest vocabularies take 20 MB.
MAX_HEADER_BYTES = 256 << 20
_FIRST_BYTES = 1 << 20
_MAX_NAME_BYTES = 65535  # the specification's limit for keys; tokens are shorter
ALIGNMENT = "general.alignment"
MAGIC = b"GGUF"
VERSION = 3

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

# Types of metadata values by type number.
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype(np.bool_),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_PLAIN = {
    "F32": FLOAT32,
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_UNREADABLE = np.dtype(np.void)

Value = str | bool | int | float | np.ndarray | list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """The contents of a GGUF file."""

    metadata: dict[str, Value]
    """Numbers and strings as Python's own, arrays of numbers as NumPy arrays [n] of the
    file's dtype (read-only), arrays of strings as lists."""
    tensors: dict[str, StoredTensor]
    """In file order."""


def read_gguf(path: Path | str) -> GGUFFile:
    """Reads the header of a GGUF file (version 2 or 3), and values when they are used.

    Args:
      path: a file of at most 100,000 keys and 100,000 tensors.

    Returns:
      Metadata and tensors. Tensors of quantized types that jaxlm has no decoder for are
      listed, but cannot be read.

    Raises:
      ValueError: if it is missing or violates the format in any way.
    """
    path = Path(os.path.expanduser(path))
    file = WeightFile(path)
    header = _Header(file)
    num_tensors, num_keys = header.read_start()
    metadata: dict[str, Value] = {}
    for number in range(num_keys):
        key = header.name(f"key {number}")
        if key in metadata:
            raise ValueError(f"{path}: key {shown(key)} appears twice")
        metadata[key] = header.value(f"key {shown(key)}")
    alignment = check_alignment(path, metadata.get(ALIGNMENT, 32))
    entries: dict[str, _Entry] = {}
    for number in range(num_tensors):
        name = header.name(f"the name of tensor {number}")
        if name in entries:
            raise ValueError(f"{path}: tensor {shown(name)} appears twice")
        entries[name] = header.entry(name, alignment)
    start = -(-header.at // alignment) * alignment
    _check_extents(list(entries.values()), file.size - start)
    tensors = {n: _stored(file, start, n, e) for n, e in entries.items()}
    return GGUFFile(metadata, tensors)


class _Entry(NamedTuple):
    """A tensor in the list; the offset counts from the start of the data."""

    offset: int
    bytes: int
    shape: tuple[int, ...]
    type: TensorType
    where: str


class _Header:
    """Reads a header from front to back; `at` is the offset of the next value."""

    def __init__(self, file: WeightFile):
        self.path, self._file = file.path, file
        self.at = 0
        self._end = min(file.size, MAX_HEADER_BYTES)
        self._data = b""
        """The beginning of the file, as much as is needed."""
        self._load(_FIRST_BYTES)

    def _load(self, needed: int) -> None:
        """Reads on, so that `_data` has as many bytes as are needed, and more."""
        start, stop = len(self._data), max(needed, 2 * len(self._data))
        self._data += self._file.bytes(start, min(stop, self._end))

    def read_start(self) -> tuple[int, int]:
        """Reads up to the numbers of tensors and of keys, and returns these."""
        if self._data[:4] != MAGIC:
            raise ValueError(f"{self.path}: not a GGUF file")
        self.at = 4
        version = self._number(U32, "the version")
        if version & 0xFFFF == 0:
            raise ValueError(
                f"{self.path}: a big-endian GGUF file, which jaxlm does not read; "
                "llama.cpp's gguf_convert_endian.py converts it"
            )
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version}, not 2 or 3")
        num_tensors = self._number(U64, "the number of tensors")
        num_keys = self._number(U64, "the number of keys")
        # A key takes at least 13 bytes (length, type and one byte), a tensor 24.
        self._check_count("tensors", num_tensors, MAX_TENSORS, 24)
        self._check_count("keys", num_keys, MAX_KEYS, 13)
        return num_tensors, num_keys

    def _check_count(self, what: str, count: int, limit: int, size: int) -> None:
        if count > limit:
            raise ValueError(f"{self.path}: {count} {what}, more than {limit}")
        self._need(count * size, f"the {count} {what}")

    def _need(self, size: int, what: str) -> int:
        """Checks that `size` more bytes exist, and returns the offset after them."""
        after = self.at + size
        if after > self._end:
            is_short = after > self._file.size
            reason = "the file is truncated" if is_short else "the header is too large"
            raise ValueError(
                f"{self.path}: {what}: {size} bytes at offset {self.at} go beyond "
                f"offset {self._end}: {reason}"
            )
        if after > len(self._data):
            self._load(after)
        return after

    def _number(self, kind: struct.Struct, what: str) -> int:
        after = self._need(kind.size, what)
        (value,) = kind.unpack_from(self._data, self.at)
        self.at = after
        return value

    def text(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """Reads a string: a length and that many bytes of UTF-8."""
        length = self._number(U64, what)
        if length > limit:
            raise ValueError(f"{self.path}: {what}: {length} bytes, more than {limit}")
        after = self._need(length, what)
        try:
            value = self._data[self.at : after].decode()
        except UnicodeDecodeError as e:
            raise ValueError(f"{self.path}: {what}: not UTF-8: {e.reason}") from None
        self.at = after
        return value

    def name(self, what: str) -> str:
        name = self.text(what, _MAX_NAME_BYTES)
        if not name:
            raise ValueError(f"{self.path}: {what} is empty: is the file damaged?")
        return name

    def value(self, what: str) -> Value:
        """Reads a type and a value of it."""
        kind = self._number(U32, what)
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self._array(what)
        return self._numbers(kind, 1, what)[0].item()

    def _array(self, what: str) -> np.ndarray | list[str]:
        kind = self._number(U32, what)
        count = self._number(U64, what)
        if kind == STRING:
            return self._texts(count, what)
        if kind == ARRAY:
            raise ValueError(f"{self.path}: {what}: arrays of arrays are not supported")
        return self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {what}: unknown type {kind}")
        dtype = SCALARS[kind]
        after = self._need(count * dtype.itemsize, what)
        if kind == BOOL:
            stored = np.frombuffer(self._data, np.uint8, count, self.at)
            if (stored > 1).any():
                raise ValueError(f"{self.path}: {what}: a bool that is not 0 or 1")
        # A copy, so that the rest of the header does not stay in memory.
        values = np.frombuffer(self._data, dtype, count, self.at).copy()
        values.flags.writeable = False
        self.at = after
        return values

    def _texts(self, count: int, what: str) -> list[str]:
        """Reads `count` strings as `text` does, but inline: there may be 100,000."""
        self._need(count * U64.size, what)
        unpack, data, end, at = U64.unpack_from, self._data, self._end, self.at
        texts = []
        try:
            for _ in range(count):
                start = at + 8
                if len(data) < min(start + _MAX_NAME_BYTES, end):
                    self._load(start + _MAX_NAME_BYTES)
                    data = self._data
                at = start + unpack(data, at)[0]
                if at > end or at - start > _MAX_NAME_BYTES:
                    raise struct.error
                texts.append(data[start:at].decode())
        except struct.error:
            raise ValueError(
                f"{self.path}: {what}: string {len(texts)} of {count} goes beyond the "
                f"header, or has more than {_MAX_NAME_BYTES} bytes"
            ) from None
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{self.path}: {what}: string {len(texts)}: not UTF-8: {e.reason}"
            ) from None
        self.at = at
        return texts

    def entry(self, name: str, alignment: int) -> _Entry:
        """Reads the dimensions, type and offset of a tensor."""
        where = f"{self.path}: tensor {shown(name)}"
        num_dims = self._number(U32, f"tensor {shown(name)}")
        if num_dims > MAX_DIMS:
            raise ValueError(f"{where}: {num_dims} dimensions, more than {MAX_DIMS}")
        dims = [self._number(U64, f"tensor {shown(name)}") for _ in range(num_dims)]
        if 0 in dims:
            raise ValueError(f"{where}: a dimension is 0")
        number = self._number(U32, f"tensor {shown(name)}")
        offset = self._number(U64, f"tensor {shown(name)}")
        if number not in TENSOR_TYPES:
            raise ValueError(f"{where}: unknown type {number} ({_readable()})")
        kind = TENSOR_TYPES[number]
        shape = tuple(reversed(dims))
        count = number_of_values(shape, where)
        if (shape[-1] if shape else 1) % kind.values:
            raise ValueError(
                f"{where}: {kind.name} has blocks of {kind.values} values, which do "
                f"not fit shape {list(shape)}"
            )
        if offset % alignment:
            raise ValueError(
                f"{where}: its offset {offset} is not a multiple of {alignment}"
            )
        return _Entry(offset, count // kind.values * kind.bytes, shape, kind, where)


def check_alignment(path: Path, alignment: Any) -> int:
    """Returns an alignment; raises ValueError for one that cannot be."""
    is_power = (
        type(alignment) is int
        and 0 < alignment <= MAX_ALIGNMENT
        and not alignment & (alignment - 1)
    )
    if not is_power:
        raise ValueError(
            f"{path}: {ALIGNMENT} is not a power of two up to {MAX_ALIGNMENT}"
        )
    return alignment


def _check_extents(entries: list[_Entry], size: int) -> None:
    """Checks that no tensor goes beyond the data, and that no two overlap."""
    at, before = 0, ""
    for entry in sorted(entries, key=lambda e: e.offset):
        if entry.offset + entry.bytes > size:
            raise ValueError(
                f"{entry.where}: it ends at byte {entry.offset + entry.bytes} of the "
                f"data, which has {max(size, 0)}: the file is truncated"
            )
        if entry.offset < at:
            raise ValueError(f"{entry.where}: it overlaps {before}")
        at, before = entry.offset + entry.bytes, entry.where.partition(": ")[2]


def _stored(file: WeightFile, start: int, name: str, entry: _Entry) -> StoredTensor:
    kind = entry.type.name
    dtype = _PLAIN.get(kind, FLOAT32 if kind in DECODERS else _UNREADABLE)
    return StoredTensor(
        name=name,
        shape=entry.shape,
        dtype=dtype,
        stored_as=kind,
        where=entry.where,
        _read=partial(_read_values, file, start + entry.offset, entry),
    )


def _read_values(file: WeightFile, offset: int, entry: _Entry) -> np.ndarray:
    kind = entry.type.name
    if kind in _PLAIN:
        return file.values(offset, entry.shape, _PLAIN[kind])
    if kind not in DECODERS:
        raise ValueError(
            f"{entry.where}: its type {kind} cannot be read ({_readable()})"
        )
    blocks = file.values(offset, (entry.bytes,), np.dtype(np.uint8))
    return dequantize(blocks, kind).reshape(entry.shape)


def _readable() -> str:
    return f"readable: {', '.join([*_PLAIN, *DECODERS])}"
