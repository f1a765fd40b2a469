"""Values that are not finite, which no cast may make and no run may save."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.checkpoint.tensor_file import BFLOAT16

# Exponent bits: all set means infinity or NaN.
EXPONENT = {
    np.dtype(np.float64): (np.uint64, 0x7FF0 << 48),
    np.dtype(np.float32): (np.uint32, 0x7F80 << 16),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    BFLOAT16: (np.uint16, 0x7F80),
}
# Number of values that are checked at once; they fit the cache.
_CHUNK = 1 << 18


def is_finite(x: np.ndarray) -> bool:
    """Returns whether a contiguous float array has neither infinities nor NaN."""
    unsigned, exponent = EXPONENT[x.dtype]
    bits, mask = x.reshape(-1).view(unsigned), unsigned(exponent)
    for start in range(0, len(bits), _CHUNK):
        if (bits[start : start + _CHUNK] & mask == mask).any():
            return False
    return True


def narrowed(x: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Casts the values of a tensor.

    Raises:
      ValueError: if finite ones would become infinite.
    """
    with np.errstate(over="ignore"):
        cast = x.astype(dtype, copy=False)
    if not is_finite(cast) and is_finite(x):
        raise ValueError(
            f"{name} has values that {cast.dtype.name} cannot hold: choose bfloat16 "
            "or float32"
        )
    return cast


def first_not_finite(state: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the name of an array with NaN or infinities; None if there is none.

    Of arrays of several processes the parts of this one are looked at.
    """
    for item, arrays in state.items():
        for name, x in arrays.items():
            if x.dtype in EXPONENT and not all(map(is_finite, _parts(x))):
                return f"{item}/{name}"
    return None


def _parts(x: Any) -> list[np.ndarray]:
    shards = getattr(x, "addressable_shards", None)
    return [np.asarray(x if shards is None else s.data) for s in shards or (x,)]
