"""The safetensors format: bounded reading, and writing one tensor at a time.

Source: the specification of github.com/huggingface/safetensors. A file is the length of
the header (8 bytes, little-endian), the header (a JSON object with the dtype, shape and
byte range of each tensor; `__metadata__` maps strings to strings) and the data, without
gaps or overlaps.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.checkpoint.tensor_file import (
    BFLOAT16,
    MAX_TENSORS,
    ReadTensor,
    StoredTensor,
    TensorSpecs,
    WeightFile,
    check_given,
    number_of_values,
    write_values,
)
from jaxlm.files.durable import replacing
from jaxlm.files.strict_json import parse_object
from jaxlm.terminal.printable import shown

MAX_HEADER_BYTES = 16 << 20
# A tensor with four dimensions has 7. This bounds the number of JSON values: 16 MiB of
# "1," would take 100 times the time and memory of any real header.
_MAX_COMMAS = 10 * MAX_TENSORS
_METADATA = "__metadata__"
_DTYPE_KEYS = {"dtype", "shape", "data_offsets"}

# The official library lays tensors out by dtype, in the reverse of this order.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {name: rank for rank, name in enumerate(_DTYPES)}
_UNREADABLE = np.dtype(np.void)


class _Entry(NamedTuple):
    """A tensor in a header; offsets count from the start of the data."""

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    where: str


def read_safetensors(
    path: Path | str,
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads the header of a .safetensors file; the values are read when they are used.

    Args:
      path: a file of at most 100,000 tensors, with a header of at most 16 MiB.

    Returns:
      The tensors in file order, and the metadata. Tensors of a dtype other than F64
      F32 F16 BF16 I64 I32 I16 I8 U8 BOOL are listed, but cannot be read.

    Raises:
      ValueError: if it is missing or violates the format in any way.
    """
    path = Path(os.path.expanduser(path))
    file = WeightFile(path)
    header, start = _read_header(file)
    metadata = _read_metadata(path, header.pop(_METADATA, {}))
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{path}: {len(header)} tensors, more than {MAX_TENSORS}")
    entries = sorted(_read_entry(path, name, header[name]) for name in header)
    _check_cover(path, entries, file.size - start)
    tensors = {e.name: _stored(file, start, e) for e in entries}
    return tensors, metadata


def _read_header(file: WeightFile) -> tuple[dict[str, Any], int]:
    """Returns the parsed header, and the offset of the data in the file."""
    path, size = file.path, file.size
    if size < 8:
        raise ValueError(f"{path}: not a safetensors file: {size} bytes")
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: not a safetensors file: the header would have {length} bytes "
            f"(at most {MAX_HEADER_BYTES})"
        )
    if length > size - 8:
        raise ValueError(
            f"{path}: the header has {length} bytes, but only {size - 8} are there: is "
            "the file truncated?"
        )
    text = file.bytes(8, 8 + length)
    if not text.startswith(b"{"):
        raise ValueError(f"{path}: not a safetensors file: the header is not JSON")
    where = f"{path}: the header"
    check_values(text, where)
    return parse_object(text, where, allow_nan=False), 8 + length


def check_values(text: bytes, where: str) -> None:
    """Raises ValueError for JSON of more values than any header or index has."""
    if text.count(b",") > _MAX_COMMAS:
        raise ValueError(f"{where} has more than {_MAX_COMMAS} values")


def _read_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: {_METADATA} is not a JSON object")
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {_METADATA}: {shown(name)} is not a string")
    return metadata


def _read_entry(path: Path, name: str, entry: Any) -> _Entry:
    where = f"{path}: tensor {shown(name)}"
    # JSON can spell half a surrogate pair, which is not Unicode text.
    if not _is_unicode(name):
        raise ValueError(f"{where}: its name is not Unicode")
    if not isinstance(entry, dict) or entry.keys() != _DTYPE_KEYS:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{where}: its dtype is {shown(dtype)}, not a string")
    if not _is_sizes(shape):
        raise ValueError(f"{where}: its shape is not a list of integers >= 0")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: its data_offsets are not [begin, end]")
    begin, end = offsets
    count = number_of_values(tuple(shape), where)
    if dtype in _DTYPES and end - begin != count * _DTYPES[dtype].itemsize:
        raise ValueError(
            f"{where}: {dtype} of shape {_short(shape)} has "
            f"{count * _DTYPES[dtype].itemsize} bytes, but its offsets span "
            f"{end - begin}"
        )
    return _Entry(begin, end, name, dtype, tuple(shape), where)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_sizes(value: Any) -> bool:
    # `type`, because True is an int.
    return isinstance(value, list) and all(
        type(v) is int and 0 <= v < 1 << 63 for v in value
    )


def _short(shape: list[int]) -> str:
    return str(shape) if len(shape) < 8 else f"[{shape[0]}, {shape[1]}, ...]"


def _check_cover(path: Path, entries: list[_Entry], size: int) -> None:
    """Checks that sorted entries fill the data from the first byte to the last."""
    at, before = 0, None
    for entry in entries:
        if entry.end > size:
            raise ValueError(
                f"{entry.where}: it ends at byte {entry.end} of the data, which has "
                f"{size}: is the file truncated?"
            )
        if entry.begin < at:
            raise ValueError(f"{entry.where}: it overlaps {shown(before)}")
        if entry.begin > at:
            raise ValueError(
                f"{entry.where}: {entry.begin - at} bytes before it belong to no tensor"
            )
        at, before = entry.end, entry.name
    if at != size:
        raise ValueError(f"{path}: {size - at} bytes at its end belong to no tensor")


def _stored(file: WeightFile, start: int, entry: _Entry) -> StoredTensor:
    dtype = _DTYPES.get(entry.dtype, _UNREADABLE)
    return StoredTensor(
        name=entry.name,
        shape=entry.shape,
        dtype=dtype,
        stored_as=entry.dtype,
        where=entry.where,
        _read=partial(_read_values, file, start + entry.begin, entry, dtype),
    )


def _read_values(
    file: WeightFile, offset: int, entry: _Entry, dtype: np.dtype
) -> np.ndarray:
    if dtype is _UNREADABLE:
        raise ValueError(
            f"{entry.where}: its dtype {shown(entry.dtype)} cannot be read (readable: "
            f"{', '.join(_DTYPES)})"
        )
    if dtype == np.bool_:
        # NumPy accepts any byte as a bool, and then computes nonsense with it.
        stored = file.values(offset, entry.shape, np.dtype(np.uint8))
        if (stored > 1).any():
            raise ValueError(f"{entry.where}: BOOL with a byte other than 0 and 1")
        return stored.view(dtype)
    return file.values(offset, entry.shape, dtype)


def write_safetensors(
    path: Path | str,
    specs: TensorSpecs,
    read: ReadTensor,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a .safetensors file, byte for byte as the official library does.

    Args:
      path: replaced only when the new file is complete.
      specs: the shape and dtype of each tensor.
      read: returns the values of one tensor; called once for each. Only one tensor is
        held in memory at a time.
      metadata: strings for the header; None means `{"format": "pt"}`, without which
        transformers does not load the file.

    Raises:
      ValueError: for a dtype that the format lacks, for more than `read_safetensors`
        accepts, and if `read` returns another shape or dtype than in the specs.
      OSError: if the file cannot be written.
    """
    path = Path(os.path.expanduser(path))
    order, header = make_header(path, specs, metadata)
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            shape, dtype = specs[name]
            values = read(name)
            check_given(values, f"{path}: tensor {shown(name)}", shape, (dtype,))
            write_values(file, values)
            del values  # before the next ones are read


def make_header(
    path: Path, specs: TensorSpecs, metadata: Mapping[str, str] | None
) -> tuple[list[str], bytes]:
    """Returns the names in file order, and the padded header.

    Raises:
      ValueError: as `write_safetensors`.
    """
    if len(specs) > MAX_TENSORS:
        raise ValueError(f"{path}: {len(specs)} tensors, more than {MAX_TENSORS}")
    for name, (_, dtype) in specs.items():
        if dtype not in _NAMES:
            raise ValueError(
                f"{path}: tensor {shown(name)}: safetensors has no dtype {dtype.name} "
                f"here (it has {', '.join(d.name for d in _NAMES)})"
            )
        if name == _METADATA or not _is_unicode(name):
            raise ValueError(f"{path}: {shown(name)} cannot be the name of a tensor")
    order = sorted(specs, key=lambda name: (-_RANKS[_NAMES[specs[name][1]]], name))
    texts = {"format": "pt"} if metadata is None else dict(metadata)
    header: dict[str, Any] = {_METADATA: texts} if texts else {}
    at = 0
    for name in order:
        shape, dtype = specs[name]
        end = at + number_of_values(shape, f"{path}: {shown(name)}") * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES - 8:
        raise ValueError(f"{path}: its header has more than {MAX_HEADER_BYTES} bytes")
    return order, text + b" " * (-len(text) % 8)
