"""Decodes MXFP4 as stored in the safetensors files of gpt-oss.

Source: OCP Microscaling Formats (MX) specification v1.0. A value is an E2M1 float (one
sign bit, two exponent bits, one mantissa bit) times the scale of its block of 32, an
E8M0 number: 8 exponent bits with bias 127, where 255 is NaN. A byte holds two adjacent
values, the first in its low half.
"""

import numpy as np
from jaxtyping import Float, UInt8

from jaxlm.checkpoint.tensor_file import BFLOAT16, FLOAT32

BLOCK = 32
# Number of values decoded at once; they fit the cache and bound the memory.
_CHUNK = 1 << 17

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
# The two values of each byte as one 64-bit number, which makes the lookup faster.
_PAIRS = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], axis=-1).view(np.uint64)
_PAIRS = _PAIRS.reshape(256)
_SCALES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))


def decode_mxfp4(
    blocks: UInt8[np.ndarray, "..."],
    scales: UInt8[np.ndarray, "..."],
    dtype: np.dtype = FLOAT32,
) -> Float[np.ndarray, "..."]:
    """Decodes blocks [..., G, 16] with scales [..., G] to values [..., G * 32].

    Args:
      blocks: two values per byte.
      scales: exponents, with bias 127.
      dtype: float32 or bfloat16, which both hold every value exactly.

    Raises:
      ValueError: if the shapes do not match.
    """
    assert dtype in (FLOAT32, BFLOAT16)
    if not scales.ndim or blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(
            f"MXFP4 blocks of shape {list(blocks.shape)} do not match scales of shape "
            f"{list(scales.shape)}: expected [..., G, {BLOCK // 2}] and [..., G]"
        )
    out = np.empty((scales.size, BLOCK), dtype)
    bytes_of = np.ascontiguousarray(blocks).reshape(-1, BLOCK // 2)
    exponents = np.ascontiguousarray(scales).reshape(-1, 1)
    step = _CHUNK // BLOCK
    with np.errstate(over="ignore", invalid="ignore"):  # 2**127 * 6 is infinite
        for at in range(0, len(out), step):
            part = slice(at, at + step)
            values = _PAIRS[bytes_of[part]].view(np.float32)
            values *= _SCALES[exponents[part]]
            if dtype == BFLOAT16:
                # bfloat16 is the upper half of a float32; the lower half is 0.
                out[part].view(np.uint16)[:] = values.view(np.uint32) >> 16
            else:
                out[part] = values
    return out.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)
