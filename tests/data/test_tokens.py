import json
import os
import random
import shutil
import stat
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data import disk_cache, documents, encoding, tokens
from jaxlm.data.disk_cache import (
    DamagedEntry,
    build_once,
    cache_root,
    content_hashes,
)
from jaxlm.data.sources import find_source
from jaxlm.data.tokens import open_tokens, tokenize_source
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.tokenizers.hugging_face.bpe_trainer import train_bpe


def tokenized(path, tokenizer=None, **options):
    config = DataConfig(path=(str(path),), **options)
    source = find_source(str(path))
    hashes = content_hashes(source.files)
    return tokenize_source(source, hashes, tokenizer or ByteTokenizer(), config)


def lines(path, *documents):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    return path


def test_tokens_and_documents(tmp_path):
    path = lines(tmp_path / "a.jsonl", "ab", "c", "é")
    got = tokenized(path)
    assert got.tokens.tolist() == [97, 98, 256, 99, 256, 0xC3, 0xA9, 256]
    assert got.tokens.dtype == np.uint16
    assert got.documents.tolist() == [0, 3, 5]
    chars = tokenized(path, CharTokenizer("abcé"))
    assert chars.tokens.tolist() == [0, 1, 2, 3]
    assert chars.documents.tolist() == [0, 2, 3]


def test_documents_begin_with_bos_if_the_model_expects_it(tmp_path):
    class WithBos(ByteTokenizer):
        bos_id, adds_bos = 0, True

    path = lines(tmp_path / "a.jsonl", "ab", "c")
    plain, got = tokenized(path), tokenized(path, WithBos())
    assert got.tokens.tolist() == [0, 97, 98, 256, 0, 99, 256]
    assert got.documents.tolist() == [0, 4]
    assert got.folder != plain.folder


def test_special_tokens_that_a_text_spells_out_are_told(tmp_path, caplog):
    tokenizer = train_bpe(["ab ab ab"], 258)
    tokenized(lines(tmp_path / "a.jsonl", "ab", "<|end"), tokenizer)
    assert not caplog.messages
    spelled = "b<|endoftext|>b"
    path = lines(tmp_path / "b.jsonl", "a", spelled, spelled)
    got = tokenized(path, tokenizer)
    assert got.tokens.tolist().count(tokenizer.eos_id) == 3
    (line,) = caplog.messages
    assert line.startswith(f"{path}, line 2: the text has <|endoftext|>, which is read")


def test_tokenized_once(tmp_path, monkeypatch, cache_home):
    path = lines(tmp_path / "a.jsonl", "ab")
    first = tokenized(path)
    assert first.folder.parent == cache_home / "jaxlm" / "tokens"
    monkeypatch.setattr(tokens, "_build", None)  # A second build would fail.
    assert tokenized(path).folder == first.folder
    assert stat.S_IMODE(first.folder.parent.stat().st_mode) == 0o700


def test_everything_that_matters_is_in_the_key(tmp_path):
    path = lines(tmp_path / "a.jsonl", "ab")
    folders = {tokenized(path).folder, tokenized(path, CharTokenizer("ab")).folder}
    folders.add(tokenized(path, CharTokenizer("abc")).folder)
    folders.add(tokenized(path, invalid_utf8="replace").folder)
    # Same size and time, but other text.
    status = path.stat()
    lines(path, "ac")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = tokenized(path)
    assert changed.tokens.tolist() == [97, 99, 256]
    folders.add(changed.folder)
    assert len(folders) == 5
    # A moved file has the same text.
    path.rename(tmp_path / "b.jsonl")
    assert tokenized(tmp_path / "b.jsonl").folder == changed.folder
    os.environ.pop("XDG_CACHE_HOME")
    assert tokenized(tmp_path, cache_dir=str(tmp_path / "c")).folder.parent.name == "c"


def test_a_file_that_changes_while_it_is_read(tmp_path, cache_home):
    path = lines(tmp_path / "a.jsonl", "ab")
    source = find_source(str(path))
    hashes = content_hashes(source.files)
    lines(path, "ac")
    config = DataConfig(path=(str(path),))
    with pytest.raises(ValueError, match=r"a\.jsonl: the file was changed while"):
        tokenize_source(source, hashes, ByteTokenizer(), config)
    assert list(cache_root(None).iterdir()) == []


def test_a_large_file_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "FULL_HASH_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 5_000_000)
    files = find_source(str(path)).files
    before = content_hashes(files)
    assert content_hashes(files) == before
    os.utime(path, ns=(1, 1))
    touched = content_hashes(files)
    assert touched != before
    path.write_bytes(b"x" * 4_999_999 + b"y")
    os.utime(path, ns=(1, 1))
    assert content_hashes(files) != touched


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


DAMAGES = [
    ("tokens.bin", lambda d: d[:-1], r"it ends at byte 19, not at 20"),
    ("tokens.bin", lambda d: d + d, "it ends at byte 40, not at 20"),
    ("tokens.bin", lambda d: b"z" + d[1:], "do not have the hash"),
    ("documents.npy", lambda d: d[:-8] + b"\6" + d[-7:], "do not have the hash"),
    ("documents.npy", lambda d: d[:-1], "do not have the hash"),
    ("documents.npy", lambda d: b"", "do not have the hash"),
    ("documents.npy", None, "it cannot be read (No such file"),
    ("meta.json", lambda d: d[:-20], "it cannot be read"),
    ("meta.json", lambda d: b"[]", "it cannot be read"),
    ("meta.json", lambda d: d.replace(b"<u2", b"<u4"), "ids are <u4, not <u2"),
    ("meta.json", lambda d: d.replace(b"num_doc", b"number"), "it cannot be read"),
]


def test_a_damaged_cache_entry_is_made_again(tmp_path, caplog):
    path = lines(tmp_path / "a.jsonl", "abcdef", "gh")
    whole = tokenized(path).tokens.tolist()
    for name, change, message in DAMAGES:
        caplog.clear()
        folder = tokenized(path).folder
        assert not caplog.messages
        if change is None:
            (folder / name).unlink()
        else:
            damage(folder, name, change)
        assert tokenized(path).tokens.tolist() == whole
        (line,) = caplog.messages
        assert f"{folder / name} is damaged: " in line and message in line
        assert line.endswith(": it is made again")
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_every_flip_in_a_cache_entry_is_seen_or_harmless(tmp_path):
    """Of ids, documents and the description; only names of files are not checked."""
    folder = tokenized(lines(tmp_path / "a.jsonl", "abcdef", "gh")).folder
    rng = random.Random(0)
    for _ in range(150):
        path = rng.choice(sorted(folder.glob("*.*")))
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            got = open_tokens(folder, 257)
        except DamagedEntry:
            pass
        else:
            assert path.suffix in (".json", ".npy")
            assert got.tokens.tolist() == [*b"abcdef", 256, *b"gh", 256]
            assert got.documents.tolist() == [0, 7]
        path.write_bytes(whole)


@pytest.mark.parametrize("old_tokens", [False, True])
def test_a_copy_of_the_entry_of_another_text_is_not_taken(tmp_path, caplog, old_tokens):
    """`cp -r` of whole entries: each is sound for itself."""
    paths = [lines(tmp_path / f"{text}.jsonl", text) for text in ("ab", "cd")]
    first, second = (tokenized(path).folder for path in paths)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    if old_tokens:
        with pytest.raises(ValueError, match="is a copy of that of another text; it"):
            tokenized(paths[1], old_tokens=True)
        assert second.is_dir()
        return
    assert tokenized(paths[1]).tokens.tolist() == [*b"cd", 256]
    (line,) = caplog.messages
    assert "is a copy of that of another text: it is made again" in line
    # Entries of earlier versions have no key.
    (first / "key").unlink()
    assert tokenized(paths[0]).tokens.tolist() == [*b"ab", 256]


def test_errors_leave_nothing_behind(tmp_path, cache_home):
    path = lines(tmp_path / "a.jsonl", "ab", "aé")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: character 'é'.*offset 1"):
        tokenized(path, CharTokenizer("ab"))
    assert list(cache_root(None).iterdir()) == []


def test_unwritable_cache_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    path = lines(tmp_path / "a.jsonl", "ab")
    with pytest.raises(ValueError, match=r"cannot be written .* data\.cache_dir"):
        tokenized(path, cache_dir=str(tmp_path / "file" / "below"))


def test_two_builders_at_once(tmp_path):
    def build(work):
        (work / "x").write_text("mine")
        if not (tmp_path / "key").exists():
            build_once(
                tmp_path, "key", lambda w: (w / "x").write_text("theirs") and None
            )

    folder = build_once(tmp_path, "key", build)
    assert (folder / "x").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_two_processes_at_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 200_000)
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_tokens import tokenized
        sys.stdin.readline()
        print(tokenized({str(path)!r}, cache_dir={str(tmp_path / "c")!r}).content_hash)
    """)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", program], **pipes) for _ in "ab"]
    outputs = [p.communicate("go\n")[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_abandoned_folders_are_removed(tmp_path):
    # The last one is a person's.
    for age, name in ((0, "young_12"), (10**6, "old_1234"), (10**6, "site")):
        folder = tmp_path / f".building-{name}"
        folder.mkdir()
        (folder / "tokens.bin").write_text("x")
        when = time.time() - age
        for path in (folder / "tokens.bin", folder):
            os.utime(path, (when, when))
    build_once(tmp_path, "key", lambda work: None)
    names = [".building-site", ".building-young_12", "key"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_clock_ahead_of_that_of_the_disk_abandons_nothing(tmp_path, monkeypatch):
    """A shared disk has a clock of its own."""
    young = tmp_path / ".building-young_12"
    young.mkdir()
    now = time.time() + 10**6
    monkeypatch.setattr(time, "time", lambda: now)
    build_once(tmp_path, "key", lambda work: None)
    assert young.is_dir()


def test_pool_and_parts_give_the_same_tokens(
    tmp_path, monkeypatch, models, shakespeare
):
    monkeypatch.setattr(documents, "PART_CHARACTERS", 10_000)
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 15_000)
    path = lines(tmp_path / "a.jsonl", shakespeare[:60_000], "é", shakespeare[:50])
    tokenizer = models["bpe"]
    alone = tokenized(path, tokenizer, workers=1, cache_dir=str(tmp_path / "1"))
    monkeypatch.setattr(encoding, "POOL_BYTES", 0)
    pool = tokenized(path, tokenizer, workers=2, cache_dir=str(tmp_path / "2"))
    assert (pool.folder / "sentencepiece.model").exists()  # The pool was used.
    assert pool.content_hash == alone.content_hash
    assert (
        tokenizer.decode(np.asarray(pool.tokens[: pool.documents[1]]))
        == shakespeare[:60_000]
    )
    assert len(pool.documents) == 3
    # A document of one part has the tokens that `encode` returns.
    assert pool.tokens[pool.documents[2] : -1].tolist() == (
        tokenizer.encode(shakespeare[:50]).tolist()
    )


def test_errors_in_the_source_end_the_pool(tmp_path, monkeypatch, models):
    monkeypatch.setattr(encoding, "POOL_BYTES", 0)
    path = lines(tmp_path / "a.jsonl", "ab")
    with open(path, "a") as out:
        out.write("{")
    with pytest.raises(ValueError, match="line 2: this line is not JSON"):
        tokenized(path, models["bpe"], workers=2)
