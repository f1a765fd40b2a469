"""Our safetensors files equal those of the official library, and it reads ours."""

import json
import struct
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxlm.checkpoint.hf.safetensors_file import read_safetensors, write_safetensors
from jaxlm.checkpoint.hf.safetensors_folder import read_folder, write_folder

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def values_of_all_dtypes():
    random = np.random.default_rng(0)
    values = {"scalar": np.array(3.5, "f4"), "nothing": np.ones((2, 0), "f4")}
    for name, dtype in DTYPES.items():
        values[f"layer.é.{name}"] = (random.normal(size=(3, 5)) * 9).astype(dtype)
    return values


def layout_of(values):
    return {name: (v.shape, v.dtype) for name, v in values.items()}


def write(path, values, **more):
    write_safetensors(path, layout_of(values), values.__getitem__, **more)


def raw(path, header, data=b"", pad=b""):
    """Writes a file with any header and data."""
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def equal(stored, values):
    assert stored.keys() == values.keys()
    for name, tensor in stored.items():
        got = tensor.read()
        assert (tensor.name, tensor.shape) == (name, values[name].shape)
        assert tensor.dtype == got.dtype == values[name].dtype
        assert got.tobytes() == values[name].tobytes()
        assert not got.flags.writeable and got.flags.aligned


def test_what_is_written_is_read_and_equals_the_librarys_bytes(tmp_path):
    values = values_of_all_dtypes()
    write(tmp_path / "a.safetensors", values)
    stored, metadata = read_safetensors(tmp_path / "a.safetensors")
    equal(stored, values)
    assert metadata == {"format": "pt"}
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == safetensors.numpy.save(values, {"format": "pt"})
    official = dict(safetensors.deserialize(content))
    assert official["layer.é.BF16"]["data"] == values["layer.é.BF16"].tobytes()
    assert {s.stored_as for s in stored.values()} == set(DTYPES)
    assert stored["scalar"].where == f"{tmp_path}/a.safetensors: tensor scalar"


@pytest.mark.parametrize("metadata", [{}, {"key": 'a "b"\n\té\x7f\x01'}])
def test_the_librarys_files_are_read(tmp_path, metadata):
    values = values_of_all_dtypes()
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(values, metadata or None))
    stored, found = read_safetensors(str(path))
    equal(stored, values)
    assert found == metadata
    write(tmp_path / "b.safetensors", values, metadata=metadata)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_names_are_sorted_as_the_library_sorts_them(tmp_path):
    names = ["z", "a.10", "a.2", "Z", "é", "\U0001f600", "\uffff"]
    values = {n: np.full(i + 1, i, np.float32) for i, n in enumerate(names)}
    write(tmp_path / "a.safetensors", values)
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content == safetensors.numpy.save(values, {"format": "pt"})


def test_an_empty_file_of_tensors(tmp_path):
    write(tmp_path / "a.safetensors", {})
    assert read_safetensors(tmp_path / "a.safetensors") == ({}, {"format": "pt"})
    assert safetensors.numpy.load_file(tmp_path / "a.safetensors") == {}


def test_reading_takes_the_memory_of_the_values_once(tmp_path):
    write(tmp_path / "a.safetensors", {"a": np.zeros((1000, 1000), np.float32)})
    tracemalloc.start()
    tensor = read_safetensors(tmp_path / "a.safetensors")[0]["a"]
    opened = tracemalloc.get_traced_memory()[1]
    values = tensor.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 200_000 and peak < 4_200_000
    with pytest.raises(ValueError):
        values[0] = 1


def test_values_that_are_not_aligned(tmp_path):
    values = np.arange(6, dtype=np.float32)
    header = {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
    for spaces in range(8):
        path = raw(tmp_path / "a", header, values.tobytes(), b" " * spaces)
        equal(read_safetensors(path)[0], {"a": values})


def test_a_dtype_that_is_not_read_is_listed(tmp_path):
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    }
    stored = read_safetensors(raw(tmp_path / "x", header, bytes(4)))[0]
    assert stored["b"].read().tolist() == [0, 0]
    assert (stored["a"].stored_as, stored["a"].shape) == ("F8_E4M3", (2,))
    with pytest.raises(ValueError, match=r"x: tensor a: its dtype F8_E4M3 cannot"):
        stored["a"].read()


def test_one_tensor_at_a_time(tmp_path):
    alive = []

    def read(name):
        assert not [r for r in alive if r() is not None]
        value = np.full((10, 10), float(name), np.float32)
        alive.append(weakref.ref(value))
        return value

    names = [str(i) for i in range(8)]
    layout = {n: ((10, 10), np.dtype(np.float32)) for n in names}
    write_safetensors(tmp_path / "a.safetensors", layout, read)
    assert len(alive) == 8
    stored = read_safetensors(tmp_path / "a.safetensors")[0]
    assert {float(t.read()[3, 3]) for t in stored.values()} == set(range(8))


def test_arrays_in_another_memory_order(tmp_path):
    values = {"a": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    write(tmp_path / "a.safetensors", values)
    equal(read_safetensors(tmp_path / "a.safetensors")[0], values)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.ones(3, np.float32)})
    before = path.read_bytes()

    def fail(name):
        raise KeyError(name)

    with pytest.raises(KeyError):
        write_safetensors(path, {"b": ((1,), np.dtype(np.int8))}, fail)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

    def fail_to_open(name):
        (tmp_path / "source").open()

    with pytest.raises(FileNotFoundError) as error:
        write_safetensors(path, {"b": ((1,), np.dtype(np.int8))}, fail_to_open)
    assert error.value.filename == str(tmp_path / "source")
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "a.safetensors"
    one = {"a": ((2,), np.dtype(np.float32))}
    for value, reason in [
        (np.ones(3, np.float32), "shape [2], but the values are float32 of shape [3]"),
        (np.ones(2, np.float64), "float32 of shape [2], but the values are float64"),
    ]:
        with pytest.raises(ValueError) as error:
            write_safetensors(path, one, {"a": value}.__getitem__)
        assert f"{path}: tensor a" in str(error.value) and reason in str(error.value)
    for layout, reason in [
        ({"a": ((2,), np.dtype(np.complex64))}, "no dtype complex64"),
        ({"__metadata__": one["a"]}, "cannot be the name"),
        ({"\ud800": one["a"]}, "cannot be the name"),
        ({"a": ((1 << 40, 1 << 40), np.dtype(np.int8))}, "too large"),
        ({str(i): ((0,), np.dtype(np.int8)) for i in range(100_001)}, "100001 tensors"),
    ]:
        with pytest.raises(ValueError, match=reason):
            write_safetensors(path, layout, lambda name: np.zeros(2))
    with pytest.raises(FileNotFoundError, match=r"cannot write.*missing/a"):
        write_safetensors(tmp_path / "missing/a", one, lambda name: np.zeros(2))
    assert list(tmp_path.iterdir()) == []


# Folders.


def model(count=5):
    return {f"w{i}": np.full((4, 8), i, np.float32) for i in range(count)}


def test_a_folder_of_one_file(tmp_path):
    values = model()
    files = write_folder(tmp_path / "new", layout_of(values), values.__getitem__)
    assert files == [tmp_path / "new/model.safetensors"]
    equal(read_folder(tmp_path / "new"), values)


def test_a_folder_of_shards(tmp_path):
    values = model()  # 128 bytes each
    files = write_folder(tmp_path, layout_of(values), values.__getitem__, 300)
    assert [f.name for f in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(tmp_path.iterdir()) == files
    equal(read_folder(tmp_path), values)
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": 640}
    for name, shard in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(tmp_path / shard)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    values = model(2) | {"large": np.zeros((1000,), np.float32)} | {"z": np.ones(2)}
    files = write_folder(tmp_path, layout_of(values), values.__getitem__, 256)
    assert len(files) == 4
    equal(read_folder(tmp_path), values)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ],
)
def test_existing_weights_are_not_mixed_with_new_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    values = model()
    with pytest.raises(ValueError, match="already exists"):
        write_folder(tmp_path, layout_of(values), values.__getitem__)


def test_a_folder_that_fails_leaves_no_shards(tmp_path):
    values = model()
    layout = layout_of(values)
    del values["w4"]
    with pytest.raises(KeyError):
        write_folder(tmp_path, layout, values.__getitem__, 300)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        write_folder(tmp_path, layout, values.__getitem__, 0)


def test_the_hub_cache_is_read(tmp_path):
    """MODEL/snapshots/REVISION/name -> ../../blobs/HASH."""
    snapshot = tmp_path / "models--a--b/snapshots/0123abcd"
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    values = model()
    write_folder(snapshot, layout_of(values), values.__getitem__, 300)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"abc{i}")
        path.symlink_to(f"../../blobs/abc{i}")
    equal(read_folder(snapshot), values)
    (tmp_path / "link").symlink_to(snapshot)
    equal(read_folder(tmp_path / "link"), values)


def test_a_link_inside_the_folder_is_read(tmp_path):
    values = model()
    write(tmp_path / "weights.safetensors", values)
    (tmp_path / "model.safetensors").symlink_to("weights.safetensors")
    equal(read_folder(tmp_path), values)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "b.ckpt"]
)
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"not load pickles.*safe_serialization"):
        read_folder(tmp_path)
