"""The quantized blocks of GGUF files: decodes them to float32, and encodes Q8_0.

Source of the layouts: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c. A tensor is
a sequence of blocks of 32 or 256 adjacent values of its innermost dimension. Each block
has a scale `d`, and in some types a minimum `m`. Numbers are little-endian; `f16` is
float16. "Halves": a byte holds two 4-bit values, and all low halves come first.

Each decoder takes blocks [n, bytes] uint8 and fills values [n, 32 or 256] float32. Sums
and products are in the order of llama.cpp, so the results are equal bit for bit.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

# Number of values decoded at once; they fit the cache and bound the memory.
_CHUNK = 1 << 17

Blocks = np.ndarray
Values = np.ndarray


class TensorType(NamedTuple):
    """A type of tensor in GGUF files."""

    name: str
    """Its name in llama.cpp."""
    values: int
    """Number of values in a block."""
    bytes: int
    """Size of a block."""


# By type number. Includes types that cannot be read, so that the size of their data can
# be checked.
TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 40),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
}
SIZES = {t.name: (t.values, t.bytes) for t in TENSOR_TYPES.values()}


def dequantize(
    data: UInt8[np.ndarray, " size"], kind: str
) -> Float32[np.ndarray, " values"]:
    """Decodes a sequence of blocks.

    Args:
      data: whole blocks.
      kind: a name in `DECODERS`.
    """
    values, size = SIZES[kind]
    assert data.size % size == 0
    blocks = data.reshape(-1, size)
    out = np.empty((len(blocks), values), np.float32)
    step = _CHUNK // values
    # A damaged file may have scales that are infinite or NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, len(blocks), step):
            DECODERS[kind](blocks[at : at + step], out[at : at + step])
    return out.reshape(-1)


def _f16(blocks: Blocks, at: int) -> np.ndarray:
    """Returns the float16 at byte `at` of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _halves(qs: np.ndarray) -> np.ndarray:
    """Splits bytes [n, k] into values [n, 2, k] from 0 to 15: low halves, then high."""
    out = np.empty((len(qs), 2, qs.shape[1]), np.uint8)
    np.bitwise_and(qs, 15, out=out[:, 0])
    np.right_shift(qs, 4, out=out[:, 1])
    return out


def _bits(x: np.ndarray, width: int) -> np.ndarray:
    """Splits bytes [n, k] into values [n, 8 / width, k]; the lowest bits come first."""
    values = x[:, None] >> np.arange(0, 8, width, dtype=np.uint8)[:, None]
    values &= (1 << width) - 1
    return values


def _decode_32(blocks: Blocks, out: Values, *, fifth: bool, minimum: bool) -> None:
    """f16 d, perhaps f16 m and 32 fifth bits, 16 bytes of halves q.

    With m: d * q + m. Without: d * (q - 8), or d * (q - 16) with fifth bits, of which
    bit j belongs to value j.
    """
    q = _halves(blocks[:, -16:]).reshape(out.shape)
    if fifth:
        q |= np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little") << 4
    if minimum:
        np.multiply(q, _f16(blocks, 0), out=out)
        out += _f16(blocks, 2)
    else:
        np.subtract(q, 16 if fifth else 8, out=out, dtype=np.float32)
        out *= _f16(blocks, 0)


def _decode_q8_0(blocks: Blocks, out: Values) -> None:
    """f16 d, 32 int8 q: d * q."""
    np.multiply(blocks[:, 2:].view(np.int8), _f16(blocks, 0), out=out)


def _two_bits(qs: np.ndarray) -> np.ndarray:
    """Expands bytes [n, 64] to values [n, 16, 16] from 0 to 3, in sub-blocks of 16.

    32 bytes hold 128 values: first come the lowest two bits of all 32 bytes.
    """
    return _bits(qs.reshape(-1, 32), 2).reshape(-1, 16, 16)


def _decode_q2_k(blocks: Blocks, out: Values) -> None:
    """16 bytes of scales s (low half) and minima (high half), 64 of q, f16 d, f16 m.

    Sub-blocks of 16: (d * s) * q - m * minimum.
    """
    packed = blocks[:, :16]
    scales = _f16(blocks, 80) * (packed & 15)
    minima = _f16(blocks, 82) * (packed >> 4)
    values = out.reshape(-1, 16, 16)
    np.multiply(_two_bits(blocks[:, 16:80]), scales[:, :, None], out=values)
    values -= minima[:, :, None]


def _decode_q3_k(blocks: Blocks, out: Values) -> None:
    """32 bytes of third bits, 64 of q, 12 of scales s, f16 d: d * (s - 32) * q.

    q has two bits, minus 4 where the third bit is 0: bit j of byte l belongs to value
    32 * j + l. The 16 scales have 6 bits: the low four are halves of the first eight
    bytes, and the high two are in the last four bytes, laid out as in `_two_bits`.
    """
    third = _bits(blocks[:, :32], 1)
    third <<= 2
    q = _two_bits(blocks[:, 32:96]) | third.reshape(-1, 16, 16)
    low = _halves(blocks[:, 96:104]).reshape(-1, 16)
    scales = low | _bits(blocks[:, 104:108], 2).reshape(-1, 16) << 4
    # Scales are at most 63 and q at most 7, so the differences fit into int8.
    factors = _f16(blocks, 108) * (scales.view(np.int8) - 32)
    values = out.reshape(-1, 16, 16)
    np.multiply(q.view(np.int8) - 4, factors[:, :, None], out=values)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks bytes [n, 12] into eight scales and eight minima [n, 8], each 0 to 63.

    The low six bits of bytes 0-3 are scales 0-3, and those of bytes 4-7 minima 0-3. The
    low halves of bytes 8-11 are the low four bits of scales 4-7, and the high halves
    those of minima 4-7; their top two bits are the top bits of bytes 0-3 and 4-7.
    """
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scales, minima


def _decode_q4_k(blocks: Blocks, out: Values) -> None:
    """f16 d, f16 m, 12 bytes of scales s and minima (`_six_bits`), 128 of halves q.

    Sub-blocks of 32: (d * s) * q - m * minimum. 32 bytes hold two sub-blocks.
    """
    q = _halves(blocks[:, 16:144].reshape(-1, 32)).reshape(-1, 8, 32)
    _scale_sub_blocks(blocks, q, out)


def _decode_q5_k(blocks: Blocks, out: Values) -> None:
    """As Q4_K, but with 32 bytes of fifth bits before q.

    Bit s of byte l belongs to value 32 * s + l.
    """
    q = _halves(blocks[:, 48:176].reshape(-1, 32)).reshape(-1, 8, 32)
    fifth = _bits(blocks[:, 16:48], 1)
    fifth <<= 4
    q |= fifth
    _scale_sub_blocks(blocks, q, out)


def _scale_sub_blocks(blocks: Blocks, q: np.ndarray, out: Values) -> None:
    scales, minima = _six_bits(blocks[:, 4:16])
    values = out.reshape(-1, 8, 32)
    np.multiply(q, (_f16(blocks, 0) * scales)[:, :, None], out=values)
    values -= (_f16(blocks, 2) * minima)[:, :, None]


def _decode_q6_k(blocks: Blocks, out: Values) -> None:
    """128 bytes of halves, 64 of top bits, 16 int8 scales s, f16 d: d * s * (q - 32).

    Halves: 64 bytes hold 128 values. Top bits: as in `_two_bits`. Sub-blocks of 16.
    """
    q = _halves(blocks[:, :128].reshape(-1, 64)).reshape(-1, 16, 16)
    q |= _two_bits(blocks[:, 128:192]) << 4
    factors = _f16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    values = out.reshape(-1, 16, 16)
    np.multiply(q.view(np.int8) - 32, factors[:, :, None], out=values)


DECODERS: Mapping[str, Callable[[Blocks, Values], None]] = {
    "Q4_0": partial(_decode_32, fifth=False, minimum=False),
    "Q4_1": partial(_decode_32, fifth=False, minimum=True),
    "Q5_0": partial(_decode_32, fifth=True, minimum=False),
    "Q5_1": partial(_decode_32, fifth=True, minimum=True),
    "Q8_0": _decode_q8_0,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
}


def quantize_q8_0(values: Float[np.ndarray, " n"]) -> UInt8[np.ndarray, "blocks 34"]:
    """Encodes values as Q8_0: the largest of each 32 becomes 127 or -127.

    Args:
      values: float32 or narrower; their number is a multiple of 32.

    Raises:
      ValueError: for NaN, infinity and values above 8.3 million.
    """
    assert values.size % 32 == 0
    x = values.reshape(-1, 32).astype(np.float32)
    d = np.abs(x).max(axis=1, keepdims=True, initial=0) / np.float32(127)
    out = np.empty((len(x), 34), np.uint8)
    with np.errstate(over="ignore", divide="ignore"):
        stored = d.astype(np.float16)
        inverse = np.float32(1) / d
    inverse[np.isinf(inverse)] = 0
    if not np.isfinite(stored).all():
        raise ValueError("Q8_0 only takes finite values up to 8.3 million")
    x *= inverse
    # llama.cpp rounds halves away from zero, NumPy rounds them to even.
    rounded = np.trunc(x + np.copysign(np.float32(0.5), x))
    out[:, :2] = stored.view(np.uint8)
    out[:, 2:] = rounded.astype(np.int8).view(np.uint8)
    return out
