"""Arrays for a page: JSON that names them, and their bytes, compressed."""

import base64
import dataclasses
import gzip
from typing import Any

import numpy as np

# What JavaScript has typed arrays for; it reads float16 from 16 bits by hand.
_DTYPES = {"float32", "float16", "int32"}


def packed(value: Any) -> tuple[Any, str]:
    """Returns a value as JSON, and its arrays as text.

    Each array becomes `{"array": [dtype, shape, offset in bytes]}`. The text is base64
    of gzip of all of them, little-endian, each beginning at a multiple of 4.

    Args:
      value: dataclasses, containers, numbers, text and arrays.
    """
    parts: list[bytes] = []
    json = _json(value, parts)
    data = gzip.compress(b"".join(parts), 9, mtime=0)
    return json, base64.b64encode(data).decode()


def _json(value: Any, parts: list[bytes]) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _json(getattr(value, f.name), parts) for f in fields}
    if isinstance(value, dict):
        return {str(key): _json(item, parts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item, parts) for item in value]
    if not isinstance(value, np.ndarray):
        return value
    name = str(value.dtype)
    assert name in _DTYPES, name
    start = sum(map(len, parts))
    data = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes()
    parts.append(data + b"\0" * (-len(data) % 4))
    return {"array": [name, list(value.shape), start]}
