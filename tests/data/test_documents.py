import gzip
import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxlm.data.documents import read_documents
from jaxlm.data.sources import find_source


def texts(entry, **options):
    files = find_source(str(entry)).files
    return [d.text for f in files for d in read_documents(f, **options)]


def test_text_is_not_changed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\0\xef\xbb\xbf \xe2\x80\xa8\n\n")
    assert texts(path) == ["one\r\ntwo\0\ufeff \u2028\n\n"]


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0", b"%PDF-1.7\n%abc", b"a\0b"])
def test_a_binary_file_that_is_named(data, tmp_path):
    for path in (tmp_path / "a.bin", tmp_path / "a.pdf.gz"):
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        for choice in ("error", "replace"):
            with pytest.raises(
                ValueError, match=rf"{path.name}: this is a binary file"
            ):
                texts(path, invalid_utf8=choice)


LINES = [{"text": "one\r\n\u2028two"}, {"id": 1, "text": "thrée"}, {"text": ""}]
WANT = ["one\r\n\u2028two", "thrée"]


def test_every_format(tmp_path):
    data = "\n".join(json.dumps(x, ensure_ascii=False) for x in LINES).encode()
    data = b"\xef\xbb\xbf" + data + b"\n\n"
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    half = len(data) // 2
    frames = [zstandard.compress(data[:half]), zstandard.compress(data[half:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "e.TXT.zst").write_bytes(zstandard.compress(b"text"))
    table = pyarrow.table({"id": [1, 2, 3], "text": [x["text"] for x in LINES]})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "f.parquet"):
        assert texts(tmp_path / name) == WANT, name
    assert texts(tmp_path / "d.txt.gz") == texts(tmp_path / "e.TXT.zst") == ["text"]


def test_bad_utf8_is_located(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff\n\xe2\x80")
    with pytest.raises(ValueError, match=r"a\.txt: byte 0xff at offset 8 \(line 2\)"):
        texts(path)
    assert texts(path, invalid_utf8="replace") == ["one\ntwo \ufffd\n\ufffd"]
    (record,) = caplog.records
    assert "a.txt: 2 byte sequences" in record.getMessage()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"byte 0xff at offset 24 \(line 2\)"):
        texts(path)


def test_half_of_a_surrogate_pair(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "a\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*\\ud83d"):
        texts(path)
    assert texts(path, invalid_utf8="replace") == ["ok", "a\ufffd"]
    assert "1 byte seq" in caplog.text


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: this line is not JSON"),
        ("[" * 100_000, "line 2: this line is not JSON"),
        ("[1]", "line 2: expected a JSON object .* found list"),
        ('{"texts": "a"}', r"line 2: no field 'text' \(did you mean 'texts'\?\)"),
        ('{"text": 3}', "line 2: the field 'text' holds int"),
        ('{"text": "a", "text": "b"}', "line 2: the field 'text' is there twice"),
    ],
)
def test_bad_lines(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, " + message):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_empty_files(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="the file is empty"):
        texts(tmp_path / name)


def test_damaged_archives(tmp_path):
    data = bytes(range(256)) * 400
    packed = {"gz": gzip.compress(data), "zst": zstandard.compress(data)}
    for suffix, content in packed.items():
        for number, bad in enumerate((content[:-9], b"nonsense" * 9)):
            path = tmp_path / f"{number}.txt.{suffix}"
            path.write_bytes(bad)
            with pytest.raises(
                ValueError, match=rf"{number}\.txt\.{suffix}: .*damaged"
            ):
                texts(path)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="not a complete Parquet file"):
        texts(path)


def test_sound_archives_that_need_an_option_are_not_called_damaged(tmp_path):
    data = b"text " * 1000
    wide = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    samples = [random.Random(n).randbytes(8).hex().encode() * 20 for n in range(500)]
    words = zstandard.train_dictionary(2048, samples)
    for name, options in (
        ("window", {"compression_params": wide}),
        ("words", {"dict_data": words}),
    ):
        stream = zstandard.ZstdCompressor(**options).compressobj()
        path = tmp_path / f"{name}.txt.zst"
        path.write_bytes(stream.compress(data) + stream.flush())
        with pytest.raises(
            ValueError, match=rf"{name}\.txt\.zst: .*decompress it first"
        ):
            texts(path)


def test_a_field_of_a_part_is_no_second_one(tmp_path):
    line = r'{"text": "\"text\"", "about": {"text": "b"}}'
    (tmp_path / "a.jsonl").write_text(line)
    assert texts(tmp_path / "a.jsonl") == ['"text"']


def test_two_parquet_columns_of_one_name(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.table(columns, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="two columns have the name 'text'"):
        texts(tmp_path / "a.parquet")


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": ["a", None], "n": [1, 2]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="no column 'text'; the columns are body, n"):
        texts(path)
    with pytest.raises(ValueError, match="column 'n' holds int64"):
        texts(path, field="n")
    with pytest.raises(ValueError, match="row 2: the column 'body' is null"):
        texts(path, field="body")


def test_missing_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name, extra in (("a.txt.zst", "zst"), ("a.parquet", "parquet")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=rf"jaxlm\[{extra}\]"):
            texts(tmp_path / name)


def test_an_integer_of_5000_digits_is_located(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "id": ' + "1" * 5000 + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: this line is not JSON"):
        texts(path)


def test_damaged_parquet_is_one_line_with_the_file(tmp_path):
    rows = [f"document number {i} " * 20 for i in range(300)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    data, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        changed = bytearray(data)
        # Most of what can be damaged is in the footer.
        for at in random.integers(len(data) - 400, len(data), 2):
            changed[at] = random.integers(256)
        path.write_bytes(changed)
        try:
            texts(path)
        except ValueError as error:
            refused += 1
            message = str(error)
            assert str(path) in message and "\n" not in message
    assert refused > 50
    # The last name is that of a column in a group of rows.
    path.write_bytes(b"test".join(data.rsplit(b"text", 1)))
    with pytest.raises(ValueError, match=r"a\.parquet: .*no column 'text' in group 0"):
        texts(path)
