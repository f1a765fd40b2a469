"""Quantized blocks decode bit for bit as in llama.cpp's own package."""

import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import quants

from jaxlm.checkpoint.gguf import gguf_blocks
from jaxlm.checkpoint.gguf.gguf_blocks import DECODERS, SIZES, dequantize, quantize_q8_0
from jaxlm.checkpoint.hf.mxfp4 import decode_mxfp4


def official(name):
    return gguf.GGMLQuantizationType[name]


@pytest.mark.parametrize("kind", DECODERS)
def test_decoding_equals_the_gguf_package(kind):
    """Random bytes: all codes, and scales of all sizes, including infinity and NaN."""
    values, size = SIZES[kind]
    assert gguf.GGML_QUANT_SIZES[official(kind)] == (values, size)
    # More than one chunk, and not a multiple of it.
    count = gguf_blocks._CHUNK // values + 777
    blocks = np.random.default_rng(1).integers(0, 256, (count, size), np.uint8)
    blocks.flags.writeable = False
    got = dequantize(blocks.reshape(-1), kind)
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(blocks, official(kind)).reshape(-1)
    assert got.dtype == np.float32 and got.shape == (count * values,)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_known_blocks():
    """Computed by hand from the layouts in the docstrings."""
    one, two = np.float16(1).tobytes(), np.float16(2).tobytes()
    nibbles = bytes(range(16))  # low halves 0-15, high halves 0
    q4_1 = np.frombuffer(two + one + nibbles, np.uint8)
    wanted = [2.0 * i + 1 for i in range(16)] + [1.0] * 16
    assert dequantize(q4_1, "Q4_1").tolist() == wanted
    q8_0 = np.frombuffer(two + bytes([1, 127, 128, 255] * 8), np.uint8)
    assert dequantize(q8_0, "Q8_0").tolist() == [2.0, 254.0, -256.0, -2.0] * 8
    # Sub-block 0 has scale 3 and minimum 2, all others 0. Its q are the low halves.
    q4_k = two + one + bytes([3, 0, 0, 0, 2] + [0] * 7) + bytes([0x15] * 128)
    got = dequantize(np.frombuffer(q4_k, np.uint8), "Q4_K")
    assert got.tolist() == [2.0 * 3 * 5 - 2] * 32 + [0.0] * 224


def test_no_blocks_are_no_values():
    assert dequantize(np.zeros(0, np.uint8), "Q4_K").shape == (0,)
    assert quantize_q8_0(np.zeros(0, np.float32)).shape == (0, 34)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_decoding_takes_little_memory_beside_the_result(kind):
    values, size = SIZES[kind]
    blocks = np.zeros((1 << 22) // values * size, np.uint8)
    tracemalloc.start()
    out = dequantize(blocks, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes + (2 << 20)


def test_q8_0_equals_the_gguf_package():
    random = np.random.default_rng(2)
    x = random.normal(size=(4000, 32)).astype(np.float32)
    x *= np.float32(10) ** random.integers(-9, 6, (4000, 1))
    x[7] = 0
    x[8] = np.arange(-16, 16) + 0.5  # halves of a step
    x[8, 0] = 127
    coded = quantize_q8_0(x.reshape(-1))
    np.testing.assert_array_equal(coded, quants.quantize(x, official("Q8_0")))
    back = dequantize(coded.reshape(-1), "Q8_0").reshape(x.shape)
    step = np.abs(x).max(1, keepdims=True) / 127
    usual = step[:, 0] > 1e-4  # below, float16 has no full precision
    assert (np.abs(back - x) <= 0.57 * step)[usual].all()


def test_q8_0_of_tiny_and_of_narrow_values():
    tiny = np.full(32, 1e-40, np.float32)
    assert dequantize(quantize_q8_0(tiny).reshape(-1), "Q8_0").tolist() == [0.0] * 32
    values = np.linspace(-1, 1, 64)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = values.astype(dtype)
        wide = quantize_q8_0(narrow.astype(np.float32))
        np.testing.assert_array_equal(quantize_q8_0(narrow), wide)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_q8_0_refuses_what_it_cannot_hold(value):
    x = np.ones(64, np.float32)
    x[40] = value
    with pytest.raises(ValueError, match="finite values"):
        quantize_q8_0(x)


def test_mxfp4_by_its_definition():
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (2, 3, 5, 16), np.uint8)
    scales = random.integers(0, 256, (2, 3, 5), np.uint8)
    scales[0, 0] = [0, 1, 127, 254, 255]
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    e2m1 = [*magnitudes, *(-m for m in magnitudes)]
    wanted = np.empty((2, 3, 160), np.float64)
    for a, b, group, byte in np.ndindex(blocks.shape):
        scale = int(scales[a, b, group])
        factor = 2.0 ** (scale - 127) if scale < 255 else np.nan
        low, high = blocks[a, b, group, byte] & 15, blocks[a, b, group, byte] >> 4
        at = group * 32 + byte * 2
        wanted[a, b, at : at + 2] = e2m1[low] * factor, e2m1[high] * factor
    with np.errstate(over="ignore"):
        wanted = wanted.astype(np.float32)
    got = decode_mxfp4(blocks, scales)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted)
    assert (np.signbit(got) == np.signbit(wanted))[~np.isnan(wanted)].all()
    narrow = decode_mxfp4(blocks, scales, np.dtype(ml_dtypes.bfloat16))
    assert narrow.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(narrow.astype(np.float32), wanted)


def test_mxfp4_in_pieces():
    blocks = np.random.default_rng(4).integers(0, 256, (9001, 16), np.uint8)
    scales = np.full((9001,), 120, np.uint8)
    whole = decode_mxfp4(blocks, scales)
    for at in (0, 4095, 4096, 9000):
        part = decode_mxfp4(blocks[at : at + 1], scales[at : at + 1])
        np.testing.assert_array_equal(whole[at * 32 : at * 32 + 32], part)


@pytest.mark.parametrize("shapes", [((4, 16), (5,)), ((4, 15), (4,)), ((16,), ())])
def test_mxfp4_shapes_must_fit(shapes):
    with pytest.raises(ValueError, match="do not match"):
        decode_mxfp4(*(np.zeros(s, np.uint8) for s in shapes))
