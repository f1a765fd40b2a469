"""Workers that die, files that change, a full disk: no hang, and no half cache."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data import disk_cache, encoding, tokens
from jaxlm.data.disk_cache import DamagedEntry, cache_root, content_hashes
from jaxlm.data.loader import batches, open_dataset
from jaxlm.data.sources import find_source
from jaxlm.data.text_record import read_record, write_record
from jaxlm.data.tokens import tokenize_source
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def always_pool(monkeypatch):
    monkeypatch.setattr(encoding, "_is_slow", lambda *_: True)
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 10)


def tokenized(path, tokenizer=None, **options):
    config = DataConfig(path=(str(path),), **options)
    source = find_source(str(path))
    hashes = content_hashes(source.files)
    return tokenize_source(source, hashes, tokenizer or ByteTokenizer(), config)


def json_lines(path, texts):
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def test_a_worker_that_is_killed_leaves_nothing(tmp_path, always_pool, monkeypatch):
    path = json_lines(tmp_path / "a.jsonl", ["some text"] * 100)
    before = set(multiprocessing.active_children())
    real, pools = encoding.document_parts, []

    class Pool(encoding.ProcessPoolExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pools.append(self)

    def parts_and_a_kill(*arguments):
        for number, part in enumerate(real(*arguments)):
            # Results have come by now, and no worker is still being started: Python
            # 3.11 reports a worker that dies then in a thread of its own.
            if number == 50:
                worker, *_ = set(multiprocessing.active_children()) - before
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
                # The pool sees it in a thread. An idle worker leaves no work undone, so
                # that the rest would be read by the other.
                while not pools[0]._broken:
                    time.sleep(0.01)
            yield part

    with monkeypatch.context() as context:
        context.setattr(encoding, "document_parts", parts_and_a_kill)
        context.setattr(encoding, "ProcessPoolExecutor", Pool)
        with pytest.raises(ValueError, match=r"died, at or after .*\.jsonl, line") as e:
            tokenized(path, workers=2)
    assert "set data.workers to 1" in str(e.value) and "\n" not in str(e.value)
    assert set(multiprocessing.active_children()) == before
    assert list(cache_root(None).iterdir()) == []
    assert len(tokenized(path, workers=1).documents) == 100


def test_a_worker_that_raises_names_the_line(tmp_path, always_pool):
    path = json_lines(tmp_path / "a.jsonl", [*["ab"] * 20, "aé", "b"])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 21: character 'é'"):
        tokenized(path, CharTokenizer("ab"), workers=2)
    assert list(cache_root(None).iterdir()) == []


KILLED = """
import multiprocessing, os, signal, sys, threading, time
if __name__ == "__main__":
    sys.path.insert(0, {folder!r})
    from test_token_cache import encoding, tokenized
    encoding._is_slow = lambda *_: True
    real = encoding.document_parts
    def endless(*arguments):
        (part,) = real(*arguments)
        while True:
            yield part
    encoding.document_parts = endless
    def kill_this():
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        time.sleep(0.5)
        print(*[c.pid for c in children], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=kill_this).start()
    tokenized({path!r}, workers=2)
"""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # The second while it is read.
        return False
    # A process that nobody has waited for is a zombie.
    return state != "Z"


def test_workers_end_with_a_killed_parent_and_the_next_start_cleans_up(
    tmp_path, monkeypatch
):
    path = json_lines(tmp_path / "a.jsonl", ["some text " * 60_000])
    program = tmp_path / "program.py"
    folder = os.path.dirname(__file__)
    program.write_text(KILLED.format(folder=folder, path=str(path)))
    done = subprocess.run([sys.executable, program], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    (half,) = cache_root(None).iterdir()
    assert half.name.startswith(".building-")
    deadline = time.monotonic() + 200
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(disk_cache, "UNLOCKED_SECONDS", 0.0)
    folder = tokenized(path).folder
    assert list(cache_root(None).iterdir()) == [folder]


def test_a_folder_that_is_being_built_is_not_abandoned(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "UNLOCKED_SECONDS", 0.0)

    def build(work):
        disk_cache.build_once(tmp_path, "other", lambda inner: None)
        (work / "x").write_text("x")

    folder = disk_cache.build_once(tmp_path, "key", build)
    assert [p.name for p in folder.iterdir()] == ["x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key", "other"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 5_000)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = json_lines(tmp_path / "b.jsonl", "ab" * 500)
    for limit, text in ((20_000, path), (3_000, many)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            with pytest.raises(
                ValueError, match=r"no file of this size: .*ulimit"
            ) as e:
                tokenized(text)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert str(cache_root(None)) in str(e.value) and "cache_dir" in str(e.value)
        assert list(cache_root(None).iterdir()) == []
    # NumPy's errors have no number.
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("5 of 9")):
        monkeypatch.setattr(tokens, "_build", mock.Mock(side_effect=error))
        with pytest.raises(ValueError, match=r"cannot be written .* free\): make room"):
            tokenized(path)
        assert list(cache_root(None).iterdir()) == []


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 5_000)
    config = DataConfig(path=(str(path),), tokenizer="bytes", sequence_length=32)
    return open_dataset(config, seed=0)


def tokens_of(dataset):
    (folder,) = cache_root(None).iterdir()
    return folder / "tokens.bin"


def test_text_and_tokens_may_be_replaced_or_deleted_during_a_run(dataset, tmp_path):
    """The run reads the tokens that it has opened."""
    expected = [dataset.train_batch(step, 4) for step in range(4)]
    text, path = tmp_path / "a.txt", tokens_of(dataset)

    def same(step):
        got = dataset.train_batch(step, 4).tokens
        return np.array_equal(got, expected[step].tokens)

    text.write_text("other")
    assert same(0)
    text.unlink()
    assert same(1)
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)
    assert same(2)
    path.unlink()
    assert same(3)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_tokens_that_are_truncated_during_a_run_are_an_error_not_a_crash(
    dataset, prefetch
):
    """Mapped into memory, the process would die of SIGBUS."""
    rows = batches(dataset, 4, prefetch=prefetch)
    next(rows)
    path = tokens_of(dataset)
    os.truncate(path, 4096)
    # A read that is under way beside this may end elsewhere.
    end = r"\d+" if prefetch else "4096"
    with pytest.raises(
        DamagedEntry, match=rf"changed while it was in use.* at byte {end}"
    ):
        for _ in range(4):
            next(rows)


def test_tokens_that_are_changed_in_place_are_seen_but_a_new_time_is_nothing(dataset):
    path = tokens_of(dataset)
    first = dataset.train_batch(0, 4)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(dataset.train_batch(0, 4).tokens, first.tokens)
    # The clock of a file system goes in steps.
    before, other = path.stat().st_ctime_ns, path.with_name("other")
    other.touch()
    while other.stat().st_ctime_ns <= before:
        other.touch()
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"z")
    os.utime(path, ns=(1, 1))
    with pytest.raises(DamagedEntry, match=r"changed while it was in use.* the hash"):
        dataset.train_batch(1, 4)


@pytest.fixture
def folder_of_texts(tmp_path):
    """Two files of which a run has begun; returns their folder and the run's."""
    folder, run = tmp_path / "texts", tmp_path / "run"
    for path in (folder, run):
        path.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("some text\n" * 100)
    return folder, run


def append(folder):
    with open(folder / "a.txt", "a") as file:
        file.write("more")


def edit(folder):
    (folder / "b.txt").write_text("Some text\n" * 100)


def rename(folder):
    (folder / "b.txt").rename(folder / "c.txt")


CHANGES = [
    (append, r"a\.txt \(1,000 -> 1,004 bytes\)"),
    (edit, r"b\.txt \(other contents\)"),
    (rename, r"b\.txt \(removed\), \S+c\.txt \(new\)"),
    (shutil.rmtree, "does not exist"),
]


@pytest.mark.parametrize("change, named", CHANGES)
def test_text_that_changes_before_a_run_goes_on(folder_of_texts, change, named):
    """It is refused with what has changed, before anything is encoded again."""
    folder, run = folder_of_texts
    options = {"path": (str(folder),), "sequence_length": 32, "tokenizer": "chars"}
    first = open_dataset(DataConfig(**options), seed=0)
    write_record(run, first.texts)
    began = read_record(run)
    assert began == first.texts
    again = open_dataset(DataConfig(**options), seed=0, began=began)
    assert again.fingerprint == first.fingerprint
    entries = sorted(cache_root(None).iterdir())
    change(folder)
    with pytest.raises(ValueError, match=named) as error:
        open_dataset(DataConfig(**options), seed=0, began=began)
    assert "data.old_tokens goes on with the tokens" in str(error.value)
    assert sorted(cache_root(None).iterdir()) == entries
    # The tokens of the old text, also by a run that has its own.
    config = DataConfig(**options, old_tokens=True)
    again = open_dataset(config, seed=0, began=began)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(
        again.train_batch(3, 4).tokens, first.train_batch(3, 4).tokens
    )
    shutil.rmtree(cache_root(None))
    with pytest.raises(ValueError, match=r"old_tokens: those of the tokenizer are no"):
        open_dataset(config, seed=0, began=began)


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json"])
def test_old_tokens_that_cannot_be_read_once_are_kept(folder_of_texts, name):
    """They cannot be made again, and the next start may read them."""
    folder, run = folder_of_texts
    options = {"path": (str(folder),), "sequence_length": 32, "tokenizer": "chars"}
    first = open_dataset(DataConfig(**options), seed=0)
    write_record(run, first.texts)
    append(folder)
    (path,) = cache_root(None).glob(f"*/{name}")
    # As an error of the disk, or too many open files.
    path.rename(run / name)
    config = DataConfig(**options, old_tokens=True)
    with pytest.raises(ValueError, match=r"old_tokens: .* it is kept, as it cannot"):
        open_dataset(config, seed=0, began=read_record(run))
    (run / name).rename(path)
    again = open_dataset(config, seed=0, began=read_record(run))
    assert again.fingerprint == first.fingerprint


def test_old_tokens_need_a_run_that_began(folder_of_texts):
    folder, _ = folder_of_texts
    config = DataConfig(path=(str(folder),), old_tokens=True)
    with pytest.raises(ValueError, match=r"a run that began with this data\.path"):
        open_dataset(config, seed=0)


def test_a_damaged_record_of_texts_is_one_line(folder_of_texts, caplog):
    _, run = folder_of_texts
    for text in ("", "{", "[1]", '[{"path": "a"}]', "\0", '{"a": 1}'):
        caplog.clear()
        (run / "texts.json").write_text(text)
        assert read_record(run) is None
        (line,) = caplog.messages
        assert "texts.json cannot be read" in line and "\n" not in line
