"""Writes GGUF files, one tensor at a time; `gguf_file.py` has the format."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.gguf.gguf_blocks import TENSOR_TYPES, quantize_q8_0
from jaxlm.checkpoint.gguf.gguf_file import (
    ALIGNMENT,
    ARRAY,
    MAGIC,
    MAX_DIMS,
    SCALARS,
    STRING,
    U32,
    U64,
    VERSION,
    check_alignment,
)
from jaxlm.checkpoint.tensor_file import (
    BFLOAT16,
    FLOAT32,
    ReadTensor,
    check_given,
    number_of_values,
    write_values,
)
from jaxlm.files.durable import replacing
from jaxlm.terminal.printable import shown

_SCALAR_TYPES = {dtype: number for number, dtype in SCALARS.items()}
_TYPE_NUMBERS = {t.name: number for number, t in TENSOR_TYPES.items()}
# Types that can be written, and the dtypes that each is written from.
_WRITABLE = {
    "F32": (FLOAT32,),
    "F16": (np.dtype(np.float16),),
    "BF16": (BFLOAT16,),
    "Q8_0": (FLOAT32, BFLOAT16, np.dtype(np.float16)),
}
_MAX_WRITTEN_NAME = 63  # llama.cpp's GGML_MAX_NAME minus the final zero byte
_QUANTIZED_AT_ONCE = 1 << 20  # values

# The shape (outermost first) and type name of each tensor.
GGUFSpecs = Mapping[str, tuple[tuple[int, ...], str]]


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    specs: GGUFSpecs,
    read: ReadTensor,
    earlier: bytes | None = MAGIC,
) -> None:
    """Writes a GGUF file, version 3, byte for byte as the `gguf` package does.

    Args:
      path: replaced only when the new file is complete, and what `earlier` allows.
      metadata: in file order. Values are str, bool, int (uint32), float (float32), or
        a list of one of these (int: int32). NumPy scalars and arrays [n] are written
        in their own dtype.
      specs: the shape (outermost first, at most 4 dimensions) and type of each tensor
        in file order: F32, F16, BF16 or Q8_0.
      read: returns the values of one tensor; called once for each. Only one tensor is
        held in memory at a time. The dtype is that of the type; for Q8_0 any of the
        three.
      earlier: as for `durable.replacing`.

    Raises:
      ValueError: for metadata, names or types that the format or llama.cpp does not
        accept, and if `read` returns another shape or dtype than in the specs.
      OSError: if the file cannot be written.
    """
    path = Path(os.path.expanduser(path))
    alignment = metadata.get(ALIGNMENT, 32)
    if isinstance(alignment, np.integer):
        alignment = int(alignment)
    alignment = check_alignment(path, alignment)
    parts = [MAGIC, U32.pack(VERSION), U64.pack(len(specs))]
    parts.append(U64.pack(len(metadata)))
    for key, value in metadata.items():
        parts += [_packed_text(key), _packed_value(f"{path}: key {shown(key)}", value)]
    offset = 0
    for name, (shape, kind) in specs.items():
        size = _written_bytes(f"{path}: tensor {shown(name)}", name, shape, kind)
        parts += [_packed_text(name), U32.pack(len(shape))]
        parts += [U64.pack(d) for d in reversed(shape)]
        parts += [U32.pack(_TYPE_NUMBERS[kind]), U64.pack(offset)]
        offset += size + -size % alignment
    header = b"".join(parts)
    with replacing(path, earlier) as file:
        file.write(header + bytes(-len(header) % alignment))
        for name, (shape, kind) in specs.items():
            where = f"{path}: tensor {shown(name)}"
            values = read(name)
            check_given(values, where, shape, _WRITABLE[kind])
            if kind == "Q8_0":
                _write_q8_0(file, values, where)
            else:
                write_values(file, values)
            del values  # before the next ones are read
            file.write(bytes(-file.tell() % alignment))


def _packed_text(text: str) -> bytes:
    content = text.encode()
    return U64.pack(len(content)) + content


def _packed_value(where: str, value: Any) -> bytes:
    """Packs the type and the bytes of a metadata value."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, str):
        return U32.pack(STRING) + _packed_text(value)
    if isinstance(value, (bool, int, float, np.generic)):
        kind, data = _packed_numbers(where, value, np.uint32)
        return U32.pack(kind) + data
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
        if not all(isinstance(v, str) for v in value):
            raise ValueError(f"{where}: a list of strings and of other values")
        start = U32.pack(ARRAY) + U32.pack(STRING) + U64.pack(len(value))
        return start + b"".join(map(_packed_text, value))
    if isinstance(value, (list, tuple, np.ndarray)):
        kind, data = _packed_numbers(where, value, np.int32)
        return U32.pack(ARRAY) + U32.pack(kind) + U64.pack(len(value)) + data
    raise ValueError(f"{where}: GGUF has no type for a {type(value).__name__}")


def _packed_numbers(where: str, value: Any, integer: type) -> tuple[int, bytes]:
    """Packs a number or an array of numbers: its type number, and its bytes.

    Python integers are written as `integer`.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        array = np.asarray(value)
    else:
        array = _as_array(where, value, integer)
    if array.dtype not in _SCALAR_TYPES or array.ndim > 1:
        raise ValueError(f"{where}: GGUF has no type for {array.dtype} {array.ndim}-D")
    return _SCALAR_TYPES[array.dtype], array.tobytes()


def _as_array(where: str, value: Any, integer: type) -> np.ndarray:
    many = value if isinstance(value, (list, tuple)) else [value]
    kinds = {type(v) for v in many}
    dtype = {bool: np.bool_, int: integer, float: np.float32}.get(
        kinds.pop() if len(kinds) == 1 else None
    )
    if dtype is None:
        raise ValueError(
            f"{where}: an empty list, or one of several types: pass a NumPy array"
        )
    try:
        if dtype is np.float32:
            with np.errstate(over="raise"):
                return np.array(many, np.float64).astype(dtype)
        return np.array(many, dtype)
    except (OverflowError, FloatingPointError):
        raise ValueError(
            f"{where}: too large for {np.dtype(dtype)}: pass a wider NumPy type"
        ) from None


def _written_bytes(where: str, name: str, shape: tuple[int, ...], kind: str) -> int:
    """Checks a tensor to be written, and returns its size in bytes."""
    if kind not in _WRITABLE:
        raise ValueError(
            f"{where}: {kind} cannot be written ({', '.join(_WRITABLE)} can)"
        )
    if len(name.encode()) > _MAX_WRITTEN_NAME:
        raise ValueError(f"{where}: the name has more than {_MAX_WRITTEN_NAME} bytes")
    if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
        raise ValueError(f"{where}: GGUF has no shape {list(shape)}")
    block = TENSOR_TYPES[_TYPE_NUMBERS[kind]]
    if shape[-1] % block.values:
        raise ValueError(
            f"{where}: {kind} requires an innermost dimension that is a multiple of "
            f"{block.values}, not {shape[-1]}"
        )
    return number_of_values(shape, where) // block.values * block.bytes


def _write_q8_0(file: Any, values: np.ndarray, where: str) -> None:
    flat = np.ascontiguousarray(values).reshape(-1)
    try:
        for at in range(0, len(flat), _QUANTIZED_AT_ONCE):
            write_values(file, quantize_q8_0(flat[at : at + _QUANTIZED_AT_ONCE]))
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
