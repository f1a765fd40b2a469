"""Fuzzers of the files of text that a run reads, and of their tokens."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import zstandard
from fuzz_case import VALUES, WORDS, as_json, damaged, json_files, read_one_file
from hypothesis import strategies as st

from jaxlm.config import DataConfig
from jaxlm.data.disk_cache import content_hashes
from jaxlm.data.documents import read_documents
from jaxlm.data.sources import find_source
from jaxlm.data.text_record import FILE_NAME as TEXTS
from jaxlm.data.text_record import current_texts, read_record, write_record
from jaxlm.data.tokens import open_tokens, tokenize_source
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

_LINES = ["one", "two é", "", "x" * 3000, "\u2028", "a\nb"]
_JSON_LINES = "\n".join(json.dumps({"id": 1, "text": x}) for x in _LINES).encode()
_PLAIN = b"\xef\xbb\xbf" + "\r\n".join(_LINES).encode() + b"\0"


def _read(path):
    for choice in ("error", "replace"):
        for file in find_source(str(path)).files:
            for document in read_documents(file, invalid_utf8=choice):
                document.text.encode()


def _of_kind(name, files):
    """A fuzzer of files of one kind, read with both ways to treat what is no UTF-8."""

    def fuzzer(folder):
        path = folder / name

        def read(content):
            path.write_bytes(content)
            _read(path)

        return files, read

    return fuzzer


def _compressed(content):
    """Strategy: an archive that is damaged, or one of something damaged."""
    frames = zstandard.compress(content[:50]) + zstandard.compress(content[50:])
    return {
        "gz": damaged(gzip.compress(content)) | damaged(content).map(gzip.compress),
        "zst": damaged(frames) | damaged(content).map(zstandard.compress),
    }


_ANY_LINE = st.one_of(
    st.binary(max_size=40),
    json_files({"id": 1, "text": "two é"}, VALUES | st.sampled_from(WORDS)),
    st.dictionaries(st.sampled_from(["text", "id", "", "\n"]), VALUES).map(as_json),
)
_JSONL = damaged(_JSON_LINES) | st.lists(_ANY_LINE, max_size=5).map(b"\n".join)


def _tables():
    """Parquet files of several kinds: plain, compressed, nested, without text."""
    columns = [
        {"id": range(6), "text": _LINES},
        {"text": [*_LINES, None]},
        {"text": list(range(6))},
        {"text": [["a"], ["b", "c"]]},
    ]
    found = []
    for values in columns:
        for options in ({}, {"compression": "zstd"}, {"use_dictionary": False}):
            out = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table(values), out, **options)
            found.append(out.getvalue())
    return found


def tokens(folder):
    """The folder of tokens in the cache, any of whose files may be damaged."""
    text = folder / "a.txt"
    text.write_text("one two three\n" * 20)
    source, tokenizer = find_source(str(text)), ByteTokenizer()
    config = DataConfig(path=(str(text),), cache_dir=str(folder / "cache"))
    hashes = content_hashes(source.files)
    entry = tokenize_source(source, hashes, tokenizer, config).folder
    good = {path.name: path.read_bytes() for path in entry.iterdir()}
    meta = json.loads(good["meta.json"])

    def read(value):
        name, content = value
        (entry / name).write_bytes(content)
        try:
            opened = open_tokens(entry, tokenizer.vocab_size)
            opened.tokens.tolist()
        finally:
            (entry / name).write_bytes(good[name])

    values = st.one_of(
        st.tuples(st.just("meta.json"), json_files(meta)),
        st.sampled_from(["tokens.bin", "documents.npy"]).flatmap(
            lambda name: st.tuples(st.just(name), damaged(good[name]))
        ),
    )
    return values, read


def text_record(folder):
    """What the texts of a run were: without it they are only not compared."""
    text = folder / "a.txt"
    text.write_text("one")
    write_record(folder, current_texts(DataConfig(path=(str(text),)), None))
    values = json.loads((folder / TEXTS).read_bytes())

    def read(path):
        if read_record(path.parent) is None:
            raise ValueError("it is said that it is damaged")

    return json_files(values), read_one_file(folder / TEXTS, read)


FUZZERS = {
    "text": (_of_kind("a.txt", damaged(_PLAIN) | st.binary(max_size=99)), 50),
    "unknown suffix": (_of_kind("a.bin", damaged(_PLAIN)), 50),
    "txt.gz": (_of_kind("a.txt.gz", _compressed(_PLAIN)["gz"]), 50),
    "txt.zst": (_of_kind("a.txt.zst", _compressed(_PLAIN)["zst"]), 50),
    "jsonl": (_of_kind("a.jsonl", _JSONL), 100),
    "jsonl.gz": (_of_kind("a.jsonl.gz", _compressed(_JSON_LINES)["gz"]), 50),
    "parquet": (
        _of_kind("a.parquet", st.sampled_from(_tables()).flatmap(damaged)),
        100,
    ),
    "tokens": (tokens, 50),
    "texts.json": (text_record, 50),
}
