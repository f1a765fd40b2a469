"""Texts that are odd, huge, or no files: read as they are, or refused in one line."""

import itertools
import os
import random
import tempfile
import tracemalloc
from pathlib import Path

import pytest

from jaxlm.config import DataConfig
from jaxlm.data import documents, parquet_pages
from jaxlm.data.documents import read_documents
from jaxlm.data.loader import open_dataset
from jaxlm.data.sources import find_source
from jaxlm.tokenizers import training
from jaxlm.tokenizers.kinds import tokenizer_of_hugging_face
from jaxlm.tokenizers.training import cut_passages

# Bytes of one to four in a character, line ends of each kind, NUL, half a character.
ALPHABET = ["a", "b", " ", "\n", "\r\n", "\r", "é", "€", "🙂", "\ufffd", "\0"]
BROKEN = [b"\xff", b"\xe2\x82", b"\xf0\x9f", b"\xc0\x80", b"\xed\xa0\x80"]


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(path, **options):
    (file,) = find_source(str(path)).files
    return list(read_documents(file, **options))


def outcome(path, invalid_utf8, caplog):
    """Returns all that a reader sees: text, parts, message, warnings."""
    caplog.clear()
    try:
        parts = read(path, invalid_utf8=invalid_utf8)
    except ValueError as error:
        return str(error)
    flags = [(p.text, p.where, p.starts, p.ends) for p in parts]
    return flags, list(caplog.messages)


def test_a_text_read_in_blocks_is_the_text_read_at_once(tmp_path, monkeypatch, caplog):
    rng, path = random.Random(0), tmp_path / "a.txt"
    for number in range(150):
        data = "".join(rng.choices(ALPHABET, k=rng.randint(1, 60))).encode()
        if number % 3 == 0:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + rng.choice(BROKEN) + data[at:]
        path.write_bytes(b"\xef\xbb\xbf" * (number % 2) + data)
        monkeypatch.setattr(documents, "PART_CHARACTERS", rng.randint(1, 40))
        for invalid_utf8 in ("error", "replace"):
            monkeypatch.setattr(documents, "_BLOCK_BYTES", 10_000)
            expected = outcome(path, invalid_utf8, caplog)
            monkeypatch.setattr(documents, "_BLOCK_BYTES", rng.randint(3, 9))
            assert outcome(path, invalid_utf8, caplog) == expected
        if not isinstance(expected, str):
            text = "".join(text for text, *_ in expected[0])
            assert text == data.decode("utf-8", errors="replace")
            assert expected[0][0][2] and expected[0][-1][3]


def test_passages_do_not_depend_on_the_parts(monkeypatch):
    monkeypatch.setattr(training, "PASSAGE_CHARACTERS", 7)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("ab \n", k=rng.randint(1, 60)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        ends = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(ends)]
        expected = list(cut_passages([(text, True), ("next", True)]))
        flags = [False] * (len(parts) - 1) + [True]
        given = [*zip(parts, flags, strict=True), ("next", True)]
        assert list(cut_passages(given)) == expected
        assert list(cut_passages((p, True) for p in expected)) == expected


def test_a_large_text_is_never_in_memory_as_a_whole(tmp_path):
    path, size = tmp_path / "a.txt", 40_000_000
    with open(path, "wb") as file:
        for _ in range(size // 1_000_000):
            file.write(b"0123456789abcde\n" * 62_500)
    (file,) = find_source(str(path)).files
    tracemalloc.start()
    total = sum(len(part.text) for part in read_documents(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == size and peak < 30_000_000


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(1 << 40)  # a terabyte that needs no space
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: a line of more than 1000"):
        read(path)


def zstd_of_equal_bytes(count, head=b"", letter=b"a"):
    """Returns a frame of `head` and blocks of 128 KiB of one letter, of four bytes each."""
    frame = b"\x28\xb5\x2f\xfd\x00\x58"  # a window of 2 MiB, no size, no checksum
    frame += (len(head) << 3).to_bytes(3, "little") + head
    block = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + letter
    return frame + block * count + (1).to_bytes(3, "little")


def test_small_files_that_unfold_to_gigabytes(tmp_path):
    """They are read in parts, or refused, in bounded memory."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    text, line = tmp_path / "a.txt.zst", tmp_path / "a.jsonl.zst"
    text.write_bytes(zstd_of_equal_bytes(8192))  # 1 GiB in 32 kB
    line.write_bytes(zstd_of_equal_bytes(8192, b'{"text": "'))
    page = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [10_000_000 * "a"]})
    pyarrow.parquet.write_table(table, page, compression="zstd", use_dictionary=False)
    del table
    pool = pyarrow.default_memory_pool()
    before = pool.max_memory()
    tracemalloc.start()
    (file,) = find_source(str(text)).files
    parts = itertools.islice(read_documents(file), 3)
    assert [len(part.text) for part in parts] == [4_000_000] * 3
    with pytest.raises(ValueError, match=r"line 1: a line of more than 33554432 byte"):
        read(line)
    with pytest.raises(ValueError, match=r"a page of \d+ bytes claims 1000\d+, more"):
        read(page)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120_000_000 and pool.max_memory() == before


def test_a_small_parquet_file_of_a_long_text_in_many_rows(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path, text = tmp_path / "a.parquet", 2_000_000 * "a"
    table = pyarrow.table({"text": pyarrow.array([text] * 128)})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    del table
    assert path.stat().st_size < 10_000
    pool = pyarrow.default_memory_pool()
    (file,) = find_source(str(path)).files
    parts = read_documents(file)
    assert next(parts).text == text
    assert pool.bytes_allocated() < 200_000_000
    # 256 MB of text in all.
    monkeypatch.setattr(documents, "MAX_UNFOLDED_BYTES", 3_000_000)
    with pytest.raises(
        ValueError, match=r"a\.parquet.* unfold to 4,000,000 and more, "
    ):
        read(path)


def test_a_compressed_file_without_end_is_left(tmp_path, monkeypatch):
    """Before it has filled the disk of the cache, even if it has no text to store."""
    pytest.importorskip("zstandard")
    monkeypatch.setattr(documents, "MAX_UNFOLDED_BYTES", 600_000)
    large, lines, small = (tmp_path / f"{n}.zst" for n in ("a.txt", "a.jsonl", "b.txt"))
    large.write_bytes(zstd_of_equal_bytes(8))  # 1 MiB
    lines.write_bytes(zstd_of_equal_bytes(8, letter=b"\n"))
    small.write_bytes(zstd_of_equal_bytes(4))
    for path in (large, lines):
        with pytest.raises(ValueError, match=r"a\..*: 4\d bytes unfold to .*disk"):
            read(path)
    assert sum(len(part.text) for part in read(small)) == 4 << 17


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_of_parquet_files_are_checked_before_they_are_read(
    tmp_path, version, dictionary
):
    """The sizes in their headers are those of the metadata at the end, for the sum."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    texts = [f"{i % 700} text" * (i % 9) for i in range(3000)]
    table = pyarrow.table({"number": range(3000), "text": texts})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", compression="gzip", data_page_version=version,
        use_dictionary=dictionary, row_group_size=1000, data_page_size=2000, write_batch_size=100,
    )  # fmt: skip
    metadata = pyarrow.parquet.read_metadata(tmp_path / "a.parquet")
    with open(tmp_path / "a.parquet", "rb") as file:
        for group in range(3):
            chunk = metadata.row_group(group).column(1)
            sizes = list(parquet_pages._page_sizes(file, chunk))
            assert len(sizes) > 1
            headers = chunk.total_compressed_size - sum(stored for stored, _ in sizes)
            assert chunk.total_uncompressed_size == headers + sum(n for _, n in sizes)
    assert [part.text for part in read(tmp_path / "a.parquet")] == [
        *filter(None, texts)
    ]


def test_nul_bytes_are_told(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes(b"text\n" + bytes(100))
    assert read(path)[0].text == "text\n" + 100 * "\0"
    (line,) = caplog.messages
    assert "a.txt: 100 NUL bytes are kept as text" in line


def test_pipes_and_devices_are_no_texts(tmp_path):
    """They would be waited for, or read, for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    for name in ("fifo", "link.txt"):
        with pytest.raises(ValueError, match=f"{name}' is not a file but a pipe or a"):
            find_source(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"no text in this folder"):
        find_source(str(tmp_path))
    with pytest.raises(ValueError, match="no file matches the glob"):
        find_source(str(tmp_path / "*"))


def test_a_pipe_is_no_tokenizer(tmp_path):
    for name in ("tokenizer.json", "tokenizer.model", "other.json"):
        os.mkfifo(tmp_path / name)
        path = tmp_path if name != "other.json" else tmp_path / name
        with pytest.raises(ValueError, match=r"no such file|no tokenizer in this fold"):
            tokenizer_of_hugging_face(str(path))


def test_links_between_folders(tmp_path, caplog):
    """Neither a loop nor a folder twice, and a linked folder is told."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "loop").symlink_to(".")
    (folder / "deep" / "up").symlink_to("..")
    for entry in (folder, folder / "**" / "*.txt"):
        files = find_source(str(entry)).files
        assert [f.path for f in files] == [folder / "deep" / "a.txt"]
    (line,) = caplog.messages
    assert "2 linked folders" in line
    # Linked files, and a folder that is a link itself, are read.
    (tmp_path / "b.txt").symlink_to("texts/deep/a.txt")
    (tmp_path / "link").symlink_to("texts/deep")
    assert len(find_source(str(tmp_path / "b.txt")).files) == 1
    assert len(find_source(str(tmp_path / "link")).files) == 1
    assert len(find_source(str(tmp_path / "link" / "**")).files) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_folder_that_may_not_be_read_is_no_folder_without_text(tmp_path):
    """Below another one, it would be left out without a word."""
    folder = tmp_path / "texts"
    (folder / "closed").mkdir(parents=True)
    for path in (folder / "a.txt", folder / "closed" / "b.txt"):
        path.write_text("text")
    (folder / "closed").chmod(0o700)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid != 0 or parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        for entry in (folder, folder / "closed", folder / "**"):
            with pytest.raises(
                ValueError, match=r"closed: cannot be read \(Permission"
            ):
                find_source(str(entry))
    finally:
        os.seteuid(0)


def test_a_file_that_goes_away_or_fails_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 100)
    (file,) = find_source(str(path)).files
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read \(No such file"):
        list(read_documents(file))
    path.mkdir()
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read \(Is a directory"):
        list(read_documents(file))


@pytest.mark.parametrize(
    "name", ["line\nend.txt", "tab\t.txt", "\x1b[31m.txt", "a" * 251 + ".txt", "-v.txt"]
)
def test_odd_names(tmp_path, name):
    path = tmp_path / name
    path.write_text("some text\n" * 30)
    config = DataConfig(path=(str(path),), tokenizer="bytes", sequence_length=8)
    dataset = open_dataset(config, seed=0)
    assert dataset.train_batch(0, 2).tokens.shape == (2, 8)
    assert dataset.texts[0].source.files[0].path == path


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    with open(path, "w") as file:
        file.write("some text\n" * 30)
    config = DataConfig(path=(str(path),), tokenizer="bytes", sequence_length=8)
    assert open_dataset(config, seed=0).train_batch(0, 2).tokens.shape == (2, 8)
