import gzip
import os

import pytest

from jaxlm.data.documents import read_documents
from jaxlm.data.sources import find_source


def texts(entry, **options):
    files = find_source(str(entry)).files
    return [d.text for f in files for d in read_documents(f, **options)]


def test_bundled_text(shakespeare):
    assert texts("bundled:shakespeare.txt") == [shakespeare]
    with pytest.raises(
        ValueError, match=r"no bundled .*did you mean 'shakespeare\.txt'"
    ):
        find_source("bundled:shakespear.txt")


def test_folder_and_glob_are_sorted(tmp_path, caplog):
    (tmp_path / "z").mkdir()
    for name in ("b.txt", "z/a.txt", "a.txt", "note.MD", "run.py"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.txt", "note.MD", "run.py", "z/a.txt"]
    assert texts(tmp_path / "**/a.txt") == ["a.txt", "z/a.txt"]
    assert texts(tmp_path / "[ab].txt") == ["a.txt", "b.txt"]
    assert not caplog.records


def test_a_folder_that_a_glob_may_not_read_is_not_left_out(tmp_path, monkeypatch):
    """As the library does, without a word."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    assert texts(tmp_path / "*/x.txt") == ["a", "b"]
    closed, access = str(tmp_path / "b"), os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != closed and access(p, mode))
    for pattern in ("*/x.txt", "[ab]/*.txt"):
        with pytest.raises(ValueError, match=f"the folder {closed} cannot be read"):
            find_source(str(tmp_path / pattern))
    assert texts(tmp_path / "a/*.txt") == ["a"]


def test_what_a_folder_does_not_give_is_said(tmp_path, caplog):
    (tmp_path / ".git").mkdir()
    names = ("a.txt", "b.md", "c.md", "d.csv", "e.png", "f.PNG", "LICENSE", "g.tar.gz")
    for name in (*names, ".git/x.py", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    for name in ("__init__.py", "empty.txt"):
        (tmp_path / name).touch()
    assert texts(tmp_path) == ["a.txt", "b.md", "c.md"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: reads 2 .md and 1 .txt; skips 2 .png, 2 empty, 1 .csv, 1 .tar.gz "
        "and 1 without a suffix (name a file, or use a glob, to read it whatever its "
        "suffix)"
    )
    # A hidden folder that is named is not hidden.
    assert texts(tmp_path / ".git") == [".git/x.py"]
    # A glob names the files.
    assert texts(tmp_path / "*.csv") == ["d.csv"]
    assert texts(tmp_path / "*.txt") == ["a.txt"]
    with pytest.raises(ValueError, match="only empty files match the glob"):
        find_source(str(tmp_path / "*.py"))


@pytest.mark.parametrize("run", ["runs/a", "."])
def test_what_a_run_writes_is_no_text(tmp_path, run, caplog):
    """Its log would be, and a resumed run would find that the text has changed."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text")
    before = texts(tmp_path)
    for name in ("checkpoints/1/a.txt", "metrics.jsonl", "wandb/x/requirements.txt"):
        path = tmp_path / run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert texts(tmp_path) == before == ["text"]
    assert "skips 1 runs" in caplog.messages[0]


def test_any_named_file_is_text(tmp_path):
    for name in ("a.md", "b", "c.csv", "d.py", "e.json", "f.txt.bz2", "g.f90"):
        (tmp_path / name).write_text("naïve")
        assert texts(tmp_path / name) == ["naïve"], name
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress(b"x"))
    assert texts(tmp_path / "h.csv.gz") == ["x"]
    (tmp_path / "a.parquet.gz").write_text("x")
    with pytest.raises(ValueError, match=r"a\.parquet\.gz: a Parquet file inside \.gz"):
        find_source(str(tmp_path / "a.parquet.gz"))


def test_folders_without_text(tmp_path):
    with pytest.raises(
        ValueError, match=r"no text in this folder, which holds nothing"
    ):
        find_source(str(tmp_path))
    for name in ("a.png", "a.parquet.gz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        ValueError, match=r"holds 1 \.parquet\.gz and 1 \.png; name a file"
    ):
        find_source(str(tmp_path))


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert texts(tmp_path / "a[1].txt") == ["x"]


def test_missing_paths(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"exist \(did you mean 'corpus\.txt' in /.*\?\)"
    ):
        find_source(str(tmp_path / "corpu.txt"))
    with pytest.raises(ValueError, match=r"does not exist \('qqq' is not in "):
        find_source(str(tmp_path / "qqq" / "corpus.txt"))
    with pytest.raises(ValueError, match="no file matches the glob"):
        find_source(str(tmp_path / "*.jsonl"))
