"""Damaged and hostile weight files: each is read, or raises one clear ValueError.

A reader must not hang, crash, allocate what a file only claims to have, or read outside
the folder.
"""

import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
from weights_case import (
    ARRAY,
    BOOL,
    F32,
    HUGE,
    IQ2_XXS,
    Q4_1,
    STRING,
    U8,
    U32,
    array,
    entry,
    gguf,
    good_gguf,
    good_safetensors,
    key,
    read_all,
    safe,
    tensor,
    text,
)

from jaxlm.checkpoint.gguf import gguf_file
from jaxlm.checkpoint.gguf.gguf_file import read_gguf
from jaxlm.checkpoint.hf.safetensors_file import read_safetensors, write_safetensors
from jaxlm.checkpoint.hf.safetensors_folder import INDEX_FILE, read_folder


def expect_refusal(path, reason="", file=None):
    """Expects one line that names the file, quickly and with little memory."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        read_all(path)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(error.value)
    assert str(file or path) in message and "\n" not in message
    assert len(message) < 500 + len(str(path)) and message.isprintable()
    assert reason in message
    assert type(error.value) is ValueError
    # Of the processor. Measured: 0.01 s, and 0.05 s for two files of megabytes; looking
    # through all objects of a process with JAX may take a second by itself.
    assert seconds < 5
    size = path.stat().st_size if path.is_file() else 0
    assert peak < 300_000 + 3 * size
    return message


# GGUF.


ONE = key("a", U8, b"\1")
A = tensor("a", [8])

GGUF_CASES = {
    "empty": (b"", "the file is empty"),
    "magic": (gguf(start=b"GGML\3\0\0\0"), "not a GGUF file"),
    "one byte": (b"G", "not a GGUF file"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not a GGUF file"),
    "version 0": (gguf(start=b"GGUF\0\0\0\0"), "big-endian"),
    "version 1": (gguf(start=b"GGUF\1\0\0\0"), "GGUF version 1, not 2 or 3"),
    "version 4": (gguf(start=b"GGUF\4\0\0\0"), "GGUF version 4, not 2 or 3"),
    "big-endian": (gguf(start=b"GGUF\0\0\0\3"), "big-endian"),
    "no counts": (b"GGUF\3\0\0\0", "the number of tensors"),
    "keys 2^64": (gguf(num_keys=HUGE), "more than 100000"),
    "keys 100000": (gguf(num_keys=100_000), "truncated"),
    "keys 100001": (gguf(num_keys=100_001), "more than 100000"),
    "tensors 2^64": (gguf(num_tensors=HUGE), "more than 100000"),
    "tensors 100000": (gguf(num_tensors=100_000), "truncated"),
    "tensors 2^63": (gguf(num_tensors=1 << 63), "more than 100000"),
    "a key too few": (gguf([ONE], num_keys=2), "key 1 is empty"),
    "a tensor too few": (
        gguf([], [A], bytes(32), num_tensors=2),
        "the name of tensor 1 is empty",
    ),
    "key of 2^64": (gguf([text("a", HUGE)]), "key 0"),
    "key of 2^63": (gguf([text("a", 1 << 63) + bytes(9)]), "key 0"),
    "key of 70 kB": (gguf([key("a" * 70_000, U8, b"\1")]), "more than 65535"),
    "key beyond the end": (gguf([text("abcdefghi", 1000)]), "truncated"),
    "key not UTF-8": (gguf([key(b"\xff\xfe", U8, b"\1")]), "not UTF-8"),
    "half a surrogate": (gguf([key(b"\xed\xa0\x80", U8, b"\1")]), "not UTF-8"),
    "key twice": (gguf([ONE, ONE]), "key a appears twice"),
    "odd key twice": (gguf([key("\n\x1b[2J", U8, b"\1")] * 2), r"'\n\x1b[2J'"),
    "type 13": (gguf([key("a", 13, bytes(8))]), "unknown type 13"),
    "type 2^32": (gguf([key("a", HUGE >> 32, bytes(8))]), "unknown type 4294967295"),
    "text of 2^64": (gguf([key("a", STRING, text("b", HUGE))]), "more than 67108864"),
    "text too long": (gguf([key("a", STRING, text("b", 99))]), "truncated"),
    "text not UTF-8": (gguf([key("a", STRING, text(b"\xff"))]), "key a: not UTF-8"),
    "number cut": (gguf([key("a", 12)])[: 24 + 13], "key a"),
    "bool 2": (gguf([key("a", BOOL, b"\2")]), "a bool that is not 0 or 1"),
    "array of bool 2": (
        gguf([key("a", ARRAY, array(BOOL, 3, b"\0\1\2"))]),
        "a bool that is not 0 or 1",
    ),
    # The first of these makes the gguf package hang.
    "array of 2^63": (gguf([key("a", ARRAY, array(U8, 1 << 63))]), "truncated"),
    "array of 2^64": (gguf([key("a", ARRAY, array(U32, HUGE))]), "truncated"),
    "array of 2^62 numbers": (
        gguf([key("a", ARRAY, array(U32, 1 << 62))]),
        "truncated",
    ),
    "array too long": (gguf([key("a", ARRAY, array(U32, 99, bytes(8)))]), "truncated"),
    "texts 2^64": (gguf([key("a", ARRAY, array(STRING, HUGE))]), "truncated"),
    "texts 2^61": (gguf([key("a", ARRAY, array(STRING, 1 << 61))]), "truncated"),
    "text in array of 2^64": (
        gguf([key("a", ARRAY, array(STRING, 2, text("x") + text("y", HUGE)))]),
        "key a: string 1 of 2 goes beyond",
    ),
    "text of 60 MB in array": (
        gguf([key("a", ARRAY, array(STRING, 1, text("x" * 60_000_000)))]),
        "has more than 65535 bytes",
    ),
    "text in array not UTF-8": (
        gguf([key("a", ARRAY, array(STRING, 2, text("x") + text(b"\xff")))]),
        "key a: string 1: not UTF-8",
    ),
    "array of arrays": (
        gguf([key("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))]),
        "arrays of arrays",
    ),
    "nested arrays": (
        gguf([key("a", ARRAY, array(ARRAY, 1) * 20_000)]),
        "arrays of arrays",
    ),
    "array of type 77": (gguf([key("a", ARRAY, array(77, 1))]), "type 77"),
    **{
        f"alignment {name}": (
            gguf([key("general.alignment", kind, payload)]),
            "general.alignment is not a power of two",
        )
        for name, kind, payload in [
            ("0", U32, struct.pack("<I", 0)),
            ("3", U32, struct.pack("<I", 3)),
            ("2^21", U32, struct.pack("<I", 1 << 21)),
            ("2^63", 10, struct.pack("<Q", 1 << 63)),
            ("-32", 5, struct.pack("<i", -32)),
            ("text", STRING, text("32")),
            ("true", BOOL, b"\1"),
            ("32.0", 6, struct.pack("<f", 32)),
            ("array", ARRAY, array(U32, 1, struct.pack("<I", 32))),
        ]
    },
    "name of 2^64": (gguf([], [text("a", HUGE) + bytes(16)]), "name of tensor 0"),
    "name not UTF-8": (gguf([], [tensor(b"\xff", [8])], bytes(32)), "not UTF-8"),
    "tensor twice": (
        gguf([], [A, tensor("a", [8], offset=32)], bytes(64)),
        "tensor a appears twice",
    ),
    "5 dimensions": (gguf([], [tensor("a", [1] * 5)], bytes(32)), "5 dimensions"),
    "2^32 dimensions": (
        gguf([], [tensor("a", [1], num_dims=HUGE >> 32)], bytes(32)),
        "4294967295 dimensions",
    ),
    "dimension 0": (gguf([], [tensor("a", [8, 0])], bytes(32)), "a dimension is 0"),
    "shape 2^256": (gguf([], [tensor("a", [HUGE] * 4)], bytes(32)), "too large"),
    "shape 2^64": (gguf([], [tensor("a", [1 << 32] * 2)], bytes(32)), "too large"),
    # The product is 0 modulo 2**64.
    "shape wraps": (gguf([], [tensor("a", [1 << 16] * 4)], bytes(32)), "too large"),
    "shape 2^40": (gguf([], [tensor("a", [1 << 40])], bytes(32)), "truncated"),
    "tensor type 4": (gguf([], [tensor("a", [32], 4)], bytes(32)), "unknown type 4"),
    "tensor type 2^32": (
        gguf([], [tensor("a", [8], HUGE >> 32)], bytes(32)),
        "unknown type 4294967295 (readable: F32, F16, ",
    ),
    "tensor type IQ2_XXS": (
        gguf([], [tensor("a", [256], IQ2_XXS)], bytes(96)),
        "tensor a: its type IQ2_XXS cannot be read (readable: F32, ",
    ),
    "block of 33": (gguf([], [tensor("a", [33], Q4_1)], bytes(64)), "blocks of 32"),
    "block split by rows": (
        gguf([], [tensor("a", [16, 2], Q4_1)], bytes(64)),
        "do not fit shape [2, 16]",
    ),
    "block of no dimension": (
        gguf([], [tensor("a", [], Q4_1)], bytes(64)),
        "do not fit shape []",
    ),
    "offset 8": (gguf([], [tensor("a", [8], offset=8)], bytes(64)), "not a multiple"),
    "offset at the end": (
        gguf([], [tensor("a", [8], offset=32)], bytes(32)),
        "truncated",
    ),
    "offset 2^64": (
        gguf([], [tensor("a", [8], offset=HUGE - 31)], bytes(32)),
        "truncated",
    ),
    "overlap": (
        gguf([], [tensor("a", [16]), tensor("b", [8], offset=32)], bytes(64)),
        "tensor b: it overlaps tensor a",
    ),
    "same place": (gguf([], [A, tensor("b", [8])], bytes(64)), "overlaps"),
    "no data": (gguf([], [A]), "truncated"),
    "data short of a byte": (gguf([], [A], bytes(31)), "truncated"),
    "no padding": (gguf([], [A])[:-20], "truncated"),
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_hostile_gguf(tmp_path, name):
    content, reason = GGUF_CASES[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    expect_refusal(path, reason)


def test_there_are_enough_cases():
    assert len(GGUF_CASES) >= 25 and len(SAFETENSORS_CASES) >= 20


def test_the_parts_make_a_good_gguf_file(tmp_path):
    """So the cases above are not rejected for some other reason."""
    keys = [
        ONE,
        key("b", STRING, text("x")),
        key("c", ARRAY, array(STRING, 1, text("y"))),
    ]
    tensors = [A, tensor("b", [32, 2], Q4_1, 64), tensor("c", [], F32, 32)]
    path = tmp_path / "good.gguf"
    path.write_bytes(gguf(keys, tensors, bytes(64 + 40)))
    assert read_gguf(path).metadata == {"a": 1, "b": "x", "c": ["y"]}
    shapes = {n: t.shape for n, t in read_all(path).items()}
    assert shapes == {"a": (8,), "b": (2, 32), "c": ()}


GOOD = {"good.gguf": good_gguf, "good.safetensors": good_safetensors}


@pytest.fixture(scope="module", params=GOOD)
def good(request, tmp_path_factory):
    """A file of about two kilobytes in which every byte matters."""
    path = tmp_path_factory.mktemp("good") / request.param
    GOOD[request.param](path)
    assert 1500 < path.stat().st_size < 2500
    return path


def test_a_file_that_is_truncated_while_it_is_read(good, tmp_path):
    """A mapped file would end the process with SIGBUS."""
    path = tmp_path / good.name
    path.write_bytes(good.read_bytes())
    is_gguf = good.suffix == ".gguf"
    tensors = read_gguf(path).tensors if is_gguf else read_safetensors(path)[0]
    for size in (good.stat().st_size - 1, 100, 0):
        with path.open("r+b") as file:
            file.truncate(size)
        with pytest.raises(ValueError, match=rf"{path}: it ends at byte \d+, and had"):
            for tensor in tensors.values():
                tensor.read()


def test_a_header_of_gguf_is_read_as_far_as_it_goes(good, tmp_path, monkeypatch):
    if good.suffix == ".gguf":
        expected = read_gguf(good)
        monkeypatch.setattr(gguf_file, "_FIRST_BYTES", 16)
        monkeypatch.setattr(gguf_file, "_MAX_NAME_BYTES", 60)
        found = read_gguf(good)
        assert repr(found.metadata) == repr(expected.metadata)
        assert found.tensors.keys() == expected.tensors.keys()


def test_a_file_cut_at_any_byte(good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / good.name
    path.write_bytes(content)
    read_all(path)
    for size in range(len(content) - 1, -1, -1):
        with path.open("r+b") as file:
            file.truncate(size)
        with pytest.raises(ValueError) as error:
            read_all(path)
        message = str(error.value)
        assert str(path) in message and "\n" not in message


# safetensors.


ENTRY = json.dumps(entry()).encode()
MEGABYTES = 16 << 20

SAFETENSORS_CASES = {
    "empty": (b"", "the file is empty"),
    "7 bytes": (bytes(7), "not a safetensors file: 7 bytes"),
    "no header": (bytes(8), "the header is not JSON"),
    "header of 2^64": (safe({}, length=HUGE), "at most 16777216"),
    "header of 2^63": (safe({}, length=1 << 63), "at most 16777216"),
    "header too long": (safe({}, length=11), "truncated"),
    "GGUF": (gguf(), "not a safetensors file"),
    "a pickle": (b"\x80\x02}q\x00.PK\x03\x04" + bytes(99), "not a safetensors file"),
    "space first": (safe(b" {}"), "the header is not JSON"),
    "byte order mark": (safe(b"\xef\xbb\xbf{}"), "the header is not JSON"),
    "UTF-16": (safe("{}".encode("utf-16")), "the header is not JSON"),
    "a list": (safe(b"[]"), "the header is not JSON"),
    "not UTF-8": (safe(b'{"\xff": 1}'), "can't decode byte 0xff"),
    "not JSON": (safe(b"{]"), "not valid JSON"),
    "two objects": (safe(b"{}{}"), "not valid JSON"),
    "NaN": (safe(b'{"a": NaN}'), "NaN is not a JSON number"),
    "deep": (safe(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "deep objects": (safe(b'{"a":' * 100_000), "nested too deeply"),
    "16 MiB of brackets": (safe(b"{" + b"[" * (MEGABYTES - 1)), "not valid JSON"),
    "16 MiB of lists": (safe(b'{"a":[' + b"[]," * (5 << 20)), "more than 1000000"),
    "a digit 5000 times": (safe(b'{"a": ' + b"9" * 5000 + b"}"), "4300 digits"),
    "name twice": (
        safe(b'{"a": ' + ENTRY + b', "a": ' + ENTRY + b"}"),
        "the name a appears twice",
    ),
    "dtype twice": (
        safe(b'{"a": {"dtype": "F32", "dtype": "F32"}}'),
        "the name dtype appears twice",
    ),
    "metadata twice": (
        safe(b'{"__metadata__": {}, "__metadata__": {}}', b""),
        "__metadata__ appears twice",
    ),
    "metadata a list": (safe({"__metadata__": []}, b""), "not a JSON object"),
    "metadata a number": (safe({"__metadata__": {"a": 1}}, b""), "a is not a string"),
    "tensor a number": (safe({"a": 1}), "tensor a: expected dtype"),
    "no shape": (safe({"a": {"dtype": "F32"}}), "tensor a: expected dtype"),
    "a word more": (safe({"a": entry() | {"x": 1}}), "tensor a: expected dtype"),
    "half a surrogate": (
        safe({"\ud800": entry()}),
        r"'\ud800': its name is not Unicode",
    ),
    "odd name": (safe({"\n\x1b[2J": 1}), r"tensor '\n\x1b[2J': expected"),
    "long name": (safe({"a" * 100_000: 1}), "aaa...: expected"),
    "dtype a number": (safe({"a": entry(dtype=3)}), "its dtype is of type int"),
    "dtype null": (safe({"a": entry(dtype=None)}), "its dtype is of type NoneType"),
    "dtype F33": (
        safe({"a": entry(dtype="F33")}),
        "F33 cannot be read (readable: BOOL",
    ),
    "dtype F8_E5M2": (
        safe({"a": entry(dtype="F8_E5M2", shape=[8])}),
        "tensor a: its dtype F8_E5M2 cannot be read",
    ),
    "wrong dtype": (safe({"a": entry(dtype="F64")}), "has 16 bytes, but its offsets"),
    "bool 2": (
        safe({"a": entry(dtype="BOOL", shape=[8])}, b"\0\1\0\1\0\1\0\2"),
        "BOOL with a byte other than",
    ),
    **{
        f"shape {shape}"[:30]: (safe({"a": entry(shape=shape)}), "tensor a: its shape")
        for shape in [None, 2, "2", [-2], [2.0], [True, 2], [[2]], ["2"], [None], {}]
    },
    "shape 10^30": (safe({"a": entry(shape=[10**30])}), "its shape is not a list"),
    "shape 2^62": (safe({"a": entry(shape=[1 << 62])}), "its shape is too large"),
    "shape 2^128": (safe({"a": entry(shape=[1 << 32] * 4)}), "its shape is too large"),
    "shape of nothing": (
        safe({"a": entry(shape=[0, 1 << 62, 1 << 62], offsets=(0, 0))}, b""),
        "its shape is too large",
    ),
    "1000 dimensions": (safe({"a": entry(shape=[1] * 1000)}), "1000 dimensions"),
    "shape too small": (safe({"a": entry(shape=[1])}), "has 4 bytes, but its offsets"),
    **{
        f"offsets {offsets}": (
            safe({"a": entry(offsets=offsets)}),
            "its data_offsets are not [begin, end]",
        )
        for offsets in [None, 8, [8], [0, 8, 8], [-8, 0], [8, 0], [0, 8.0], ["0", "8"]]
    },
    "offsets 2^64": (safe({"a": entry(offsets=(0, HUGE))}), "are not [begin, end]"),
    "end beyond": (
        safe({"a": entry(shape=[3], offsets=(0, 12))}),
        "it ends at byte 12",
    ),
    "begin beyond": (safe({"a": entry(offsets=(800, 808))}), "it ends at byte 808"),
    "gap before": (safe({"a": entry(offsets=(4, 12))}, bytes(12)), "4 bytes before it"),
    "gap between": (
        safe({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        "tensor b: 4 bytes before it belong to no tensor",
    ),
    "data at the end": (safe({"a": entry()}, bytes(9)), "1 bytes at its end"),
    "data only": (safe({}, bytes(9)), "9 bytes at its end"),
    "overlap": (
        safe({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "tensor b: it overlaps a",
    ),
    "same place": (safe({"a": entry(), "b": entry()}), "tensor b: it overlaps a"),
    "nothing inside another": (
        safe({"a": entry(), "b": entry(shape=[0], offsets=(4, 4))}),
        "tensor b: it overlaps a",
    ),
    "100001 tensors": (
        safe({str(i): 1 for i in range(100_001)}, b""),
        "100001 tensors, more than 100000",
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS_CASES)
def test_hostile_safetensors(tmp_path, name):
    content, reason = SAFETENSORS_CASES[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    if name == "100001 tensors":  # megabytes of good JSON: memory is in proportion
        with pytest.raises(ValueError, match=reason):
            read_all(path)
    else:
        expect_refusal(path, reason)


# Paths.


def test_paths_that_are_not_files(tmp_path):
    for name in ("a.gguf", "a.safetensors"):
        expect_refusal(tmp_path / name, "no such file")
        (tmp_path / name).symlink_to(name)
        expect_refusal(tmp_path / name, "cannot be read")
        (tmp_path / name).unlink()
    (tmp_path / "pipe.gguf").symlink_to("/dev/zero")
    expect_refusal(tmp_path / "pipe.gguf", "not a regular file")
    with pytest.raises(ValueError, match="not a regular file"):
        read_gguf(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_folder(tmp_path / "missing")
    expect_refusal(tmp_path, "neither model.safetensors nor model.safetensors.index")


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../b.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "\ud800.safetensors",
        ".x.safetensors",
        "..",
        "",
        "x.bin",
        "x.safetensors/",
        "x" * 300 + ".safetensors",
        3,
        None,
        ["x.safetensors"],
        {"x.safetensors": "x.safetensors"},
    ],
)
def test_shards_are_plain_names(tmp_path, shard):
    model = tmp_path / "model"
    model.mkdir()
    good_safetensors(tmp_path / "x.safetensors")
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    message = expect_refusal(model, "not the plain name", model / INDEX_FILE)
    assert "the shard of a" in message


@pytest.mark.parametrize(
    "name, target, reason",
    [
        ("model.safetensors", "../outside.safetensors", "leads out of the folder"),
        (INDEX_FILE, "../index.json", "leads out of the folder"),
        ("model.safetensors", "../../blobs/missing", "a symbolic link to nothing"),
        ("model.safetensors", "model.safetensors", "a symbolic link to nothing"),
        ("model.safetensors", "../../blobs/abc", "leads out of the folder"),
    ],
)
def test_links_that_lead_out(tmp_path, name, target, reason):
    model = tmp_path / "deep/model"
    (tmp_path / "blobs").mkdir()
    model.mkdir(parents=True)
    good_safetensors(tmp_path / "deep/outside.safetensors")
    good_safetensors(tmp_path / "blobs/abc")
    index = {"weight_map": {"a": "outside.safetensors"}}
    (tmp_path / "deep/index.json").write_text(json.dumps(index))
    (model / name).symlink_to(target)
    expect_refusal(model, reason, model / name)


@pytest.mark.parametrize(
    "target",
    ["../../../blobs/abc", "../../blobs/deeper/abc", "../../blobs/x.y", "../other/abc"],
)
def test_links_that_only_look_like_the_hub_cache(tmp_path, target):
    model = tmp_path / "cache/snapshots/1234"
    folders = ("blobs", "cache/blobs", "cache/blobs/deeper", "cache/snapshots/other")
    model.mkdir(parents=True)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        good_safetensors(tmp_path / folder / "abc")
        good_safetensors(tmp_path / folder / "x.y")
    (model / "model.safetensors").symlink_to(target)
    expect_refusal(model, "leads out", model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../../blobs/abc")
    read_all(model)


def test_a_shard_that_links_out(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    good_safetensors(tmp_path / "x.safetensors")
    (model / "x.safetensors").symlink_to("../x.safetensors")
    (model / INDEX_FILE).write_text('{"weight_map": {"a": "x.safetensors"}}')
    expect_refusal(model, "leads out of the folder", model / "x.safetensors")


@pytest.mark.parametrize(
    "weight_map, reason",
    [
        ({"a": 1, "b": 1, "c": 2}, "tensor d is in 2.safetensors, but the index has it in no shard"),
        ({"a": 1, "b": 1, "c": 2, "d": 2, "e": 2}, "tensor e is not in 2.safetensors"),
        ({"a": 1, "b": 2, "c": 2, "d": 2}, "tensor b is in 1.safetensors, but the index has it in 2"),
        ({"a": 1, "b": 1, "c": 2, "d": 2, "e": 3}, "3.safetensors: no such file"),
        ({"a": 1, "b": 1, "c": 2, "d": 2, "a2": 4}, "tensor a is in 4.safetensors, but the index has it in 1"),
    ],
)  # fmt: skip
def test_an_index_and_shards_that_disagree(tmp_path, weight_map, reason):
    def shard(number, names):
        layout = {n: ((2,), np.dtype(np.float32)) for n in names}
        path = tmp_path / f"{number}.safetensors"
        write_safetensors(path, layout, lambda name: np.ones(2, np.float32))

    shard(1, ["a", "b"])
    shard(2, ["c", "d"])
    shard(4, ["a", "a2"])  # in two shards
    good = {"a": 1, "b": 1, "c": 2, "d": 2}
    for wanted, refusal in ((good, None), (weight_map, reason)):
        names = {n: f"{s}.safetensors" for n, s in wanted.items()}
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
        if refusal is None:
            assert read_all(tmp_path).keys() == good.keys()
        else:
            expect_refusal(tmp_path, refusal)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"[]", "not a JSON object"),
        (b"{}", "weight_map is not"),
        (b'{"weight_map": {}}', "weight_map is not"),
        (b'{"weight_map": []}', "weight_map is not"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "a appears"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "can't decode"),
        (b" " * (MEGABYTES + 1), "larger than 16777216 bytes"),
        (
            json.dumps(
                {"weight_map": dict.fromkeys(map(str, range(100_001)))}
            ).encode(),
            "100001 tensors, more than 100000",
        ),
    ],
)
def test_hostile_indices(tmp_path, content, reason):
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path)
    message = str(error.value)
    assert str(tmp_path / INDEX_FILE) in message and "\n" not in message
    assert reason in message
