"""Our GGUF files equal those of llama.cpp's own package, and it reads ours."""

import struct
import time
import weakref

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import quants

from jaxlm.checkpoint.gguf.gguf_blocks import DECODERS, TENSOR_TYPES
from jaxlm.checkpoint.gguf.gguf_file import read_gguf
from jaxlm.checkpoint.gguf.gguf_writing import write_gguf

RANDOM = np.random.default_rng(0)
TENSORS = {
    "token_embd.weight": ("F32", RANDOM.normal(size=(6, 64)).astype(np.float32)),
    "a.weight": ("F16", RANDOM.normal(size=(3, 5)).astype(np.float16)),
    "b.weight": ("BF16", RANDOM.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16)),
    "c.weight": ("Q8_0", RANDOM.normal(size=(3, 64)).astype(np.float32)),
    "c.bias": ("F32", RANDOM.normal(size=(7,)).astype(np.float32)),
}
METADATA = {
    "general.architecture": "llama",
    "general.name": "Ein Name é \U0001f600",
    "llama.block_count": 3,
    "llama.rope.freq_base": 1e4,
    "general.flag": True,
    "n.u8": np.uint8(200),
    "n.i8": np.int8(-100),
    "n.u16": np.uint16(60000),
    "n.i16": np.int16(-30000),
    "n.i32": np.int32(-7),
    "n.u64": np.uint64(1 << 60),
    "n.i64": np.int64(-(1 << 60)),
    "n.f64": np.array(0.1),
    "tokenizer.ggml.tokens": ["<s>", "", "▁a", "\n"],
    "tokenizer.ggml.token_type": [3, 1, -1],
    "tokenizer.ggml.scores": [0.5, -1.25],
}


def layout(tensors=TENSORS):
    return {name: (v.shape, kind) for name, (kind, v) in tensors.items()}


def write(path, metadata=METADATA, tensors=TENSORS):
    write_gguf(path, metadata, layout(tensors), lambda name: tensors[name][1])


def write_by_library(path, alignment=None):
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name(METADATA["general.name"])
    writer.add_block_count(3)
    writer.add_rope_freq_base(1e4)
    writer.add_bool("general.flag", True)
    writer.add_uint8("n.u8", 200)
    writer.add_int8("n.i8", -100)
    writer.add_uint16("n.u16", 60000)
    writer.add_int16("n.i16", -30000)
    writer.add_int32("n.i32", -7)
    writer.add_uint64("n.u64", 1 << 60)
    writer.add_key_value("n.i64", -(1 << 60), gguf.GGUFValueType.INT64)
    writer.add_float64("n.f64", 0.1)
    writer.add_token_list(METADATA["tokenizer.ggml.tokens"])
    writer.add_token_types(METADATA["tokenizer.ggml.token_type"])
    writer.add_token_scores(METADATA["tokenizer.ggml.scores"])
    for name, (kind, value) in TENSORS.items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(value, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_tensors(found):
    assert list(found) == list(TENSORS)
    for name, (kind, value) in TENSORS.items():
        tensor = found[name]
        got = tensor.read()
        assert (tensor.name, tensor.stored_as) == (name, kind)
        assert tensor.shape == got.shape == value.shape
        wanted = value
        if kind == "Q8_0":
            number = gguf.GGMLQuantizationType.Q8_0
            wanted = quants.dequantize(quants.quantize(value, number), number)
        assert got.dtype == tensor.dtype == wanted.dtype
        assert got.tobytes() == wanted.tobytes()
        assert not got.flags.writeable


def check_metadata(found):
    assert found.keys() == METADATA.keys()
    for key, value in METADATA.items():
        got = found[key]
        if isinstance(value, list) and not isinstance(value[0], str):
            dtype = np.int32 if isinstance(value[0], int) else np.float32
            assert got.dtype == dtype and not got.flags.writeable
            got = got.tolist()
        assert got == value
        plain = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
        assert type(got) is type(plain)


def test_the_gguf_packages_file_is_read(tmp_path):
    write_by_library(tmp_path / "a.gguf")
    found = read_gguf(str(tmp_path / "a.gguf"))
    check_tensors(found.tensors)
    check_metadata(found.metadata)
    where = f"{tmp_path}/a.gguf: tensor a.weight"
    assert found.tensors["a.weight"].where == where


def test_what_is_written_equals_the_gguf_packages_bytes(tmp_path):
    write_by_library(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert [t.name for t in reader.tensors] == list(TENSORS)


def test_another_alignment(tmp_path):
    write_by_library(tmp_path / "a.gguf", 256)
    items = list(METADATA.items())
    alignment = ("general.alignment", np.uint32(256))
    write(tmp_path / "b.gguf", dict([items[0], alignment, *items[1:]]))
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    found = read_gguf(tmp_path / "b.gguf")
    check_tensors(found.tensors)
    assert found.metadata.pop("general.alignment") == 256
    check_metadata(found.metadata)


def test_version_2(tmp_path):
    write(tmp_path / "a.gguf")
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    content[4] = 2
    (tmp_path / "a.gguf").write_bytes(content)
    check_tensors(read_gguf(tmp_path / "a.gguf").tensors)


@pytest.mark.parametrize("kind", DECODERS)
def test_quantized_tensors_have_their_rows_decoded(tmp_path, kind):
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    blocks = np.random.default_rng(5).integers(0, 60, (3, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "a.gguf").tensors["w"]
    assert tensor.shape == (3, 2 * values) and tensor.dtype == np.float32
    wanted = quants.dequantize(blocks, number)
    np.testing.assert_array_equal(tensor.read(), wanted)


def test_the_table_of_types_is_that_of_the_gguf_package():
    sizes = {n.value: (n.name, *s) for n, s in gguf.GGML_QUANT_SIZES.items()}
    assert {n: tuple(t) for n, t in TENSOR_TYPES.items()} == sizes


def test_plain_integers_and_doubles(tmp_path):
    """Reads types that only the gguf package writes."""
    values = {
        "i8": np.arange(-3, 3, dtype=np.int8),
        "i16": np.arange(-3, 3, dtype=np.int16),
        "i32": np.arange(-3, 3, dtype=np.int32),
        "i64": np.arange(-3, 3, dtype=np.int64),
        "f64": np.arange(-3, 3, dtype=np.float64),
    }
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, tensor in read_gguf(tmp_path / "a.gguf").tensors.items():
        got = tensor.read()
        assert got.dtype == tensor.dtype == values[name].dtype
        assert got.tolist() == values[name].tolist()


def test_a_vocabulary_is_read_at_once(tmp_path):
    """As large as SmolLM2's: 49152 tokens, 48900 merges; 0.05 s outside of tests.

    Reading that is quadratic in the entries would take minutes.
    """
    tokens = [f"Ġtoken{i}" for i in range(49152)]
    merges = [f"Ġto ken{i}" for i in range(48900)]
    metadata = {"tokens": tokens, "merges": merges, "types": np.ones(49152, np.int32)}
    write(tmp_path / "a.gguf", metadata)
    start = time.process_time()
    found = read_gguf(tmp_path / "a.gguf").metadata
    assert time.process_time() - start < 10
    assert found["tokens"] == tokens and found["merges"] == merges
    assert found["types"].sum() == 49152


def test_arrays_of_every_dtype(tmp_path):
    metadata = {
        np.dtype(d).name: np.arange(5).astype(d)
        for d in ("?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
    }
    metadata["empty"] = np.zeros(0, np.float32)
    write(tmp_path / "a.gguf", metadata | {"bools": [True, False]})
    found = read_gguf(tmp_path / "a.gguf").metadata
    assert found.pop("bools").tolist() == [True, False]
    for name, value in metadata.items():
        assert found[name].dtype == value.dtype
        assert found[name].tolist() == value.tolist()


def test_numbers_of_python_have_the_types_of_llama_cpp(tmp_path):
    write(tmp_path / "a.gguf", {"i": 7, "f": 0.5, "l": [7]}, {})
    content = (tmp_path / "a.gguf").read_bytes()
    key = struct.pack("<Q1s", 1, b"i")
    assert key + struct.pack("<II", 4, 7) in content  # uint32
    assert struct.pack("<Q1sIf", 1, b"f", 6, 0.5) in content  # float32
    assert struct.pack("<Q1sIIQi", 1, b"l", 9, 5, 1, 7) in content  # int32


@pytest.mark.parametrize(
    "value, reason",
    [
        (-1, "too large for uint32"),
        (1 << 32, "too large for uint32"),
        (1e300, "too large for float32"),
        ([1 << 40], "too large for int32"),
        ([], "an empty list"),
        ([1, 2.5], "several types"),
        ([True, 1], "several types"),
        (["a", 1], "strings and of other values"),
        (None, "no type for a NoneType"),
        ({"a": 1}, "no type for a dict"),
        (b"bytes", "no type for a bytes"),
        (np.float16(1), "no type for float16"),
        (np.ones((2, 2), np.int32), "no type for int32 2-D"),
        ([[1], [2]], "several types"),
    ],
)
def test_metadata_that_gguf_cannot_hold(tmp_path, value, reason):
    with pytest.raises(ValueError, match=reason) as error:
        write(tmp_path / "a.gguf", {"the.key": value})
    assert f"{tmp_path}/a.gguf: key the.key" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, shape, kind, reason",
    [
        ("a", (4,), "Q4_0", "Q4_0 cannot be written"),
        ("a", (4, 33), "Q8_0", "multiple of 32, not 33"),
        ("a", (1, 1, 1, 1, 1), "F32", "no shape"),
        ("a", (), "F32", "no shape"),
        ("a", (3, 0), "F32", "no shape"),
        ("a" * 64, (3,), "F32", "more than 63 bytes"),
    ],
)
def test_tensors_that_gguf_cannot_hold(tmp_path, name, shape, kind, reason):
    with pytest.raises(ValueError, match=reason):
        write_gguf(tmp_path / "a.gguf", {}, {name: (shape, kind)}, lambda name: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alignment", [0, 3, -32, 1 << 21, "32", True])
def test_alignments_that_gguf_cannot_have(tmp_path, alignment):
    with pytest.raises(ValueError, match=r"general\.alignment is not a power of two"):
        write(tmp_path / "a.gguf", {"general.alignment": alignment})


def test_values_must_be_those_of_the_layout(tmp_path):
    one = {"a": ((32,), "F32")}
    path = tmp_path / "a.gguf"
    for value, reason in [
        (np.ones(3, np.float32), r"shape \[3\]"),
        (np.ones(32, np.float16), "but the values are float16"),
    ]:
        with pytest.raises(ValueError, match=reason):
            write_gguf(path, {}, one, {"a": value}.__getitem__)
    infinite = np.full(32, np.inf, np.float32)
    with pytest.raises(ValueError, match="tensor a: Q8_0 only takes finite"):
        write_gguf(path, {}, {"a": ((32,), "Q8_0")}, {"a": infinite}.__getitem__)
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(tmp_path):
    alive = []

    def read(name):
        assert not [r for r in alive if r() is not None]
        value = np.full((2, 32), float(name), np.float32)
        alive.append(weakref.ref(value))
        return value

    kinds = {str(i): ((2, 32), ("F32", "Q8_0")[i % 2]) for i in range(6)}
    write_gguf(tmp_path / "a.gguf", {}, kinds, read)
    assert len(alive) == 6
