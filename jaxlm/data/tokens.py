"""Token ids of a source, encoded once, then read from disk.

A cache entry is a folder: `tokens.bin` (little-endian uint16, or uint32 for more than
65,536 ids), `documents.npy` (int64 offset of each document's first token) and
`meta.json`. Each document is followed by the tokenizer's end id, if it has one.
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from jaxlm.config import DataConfig
from jaxlm.data.disk_cache import (
    DamagedEntry,
    check_unchanged,
    key_of,
    read_or_build,
)
from jaxlm.data.documents import PART_CHARACTERS
from jaxlm.data.encoding import encode_source
from jaxlm.data.sources import Source
from jaxlm.data.token_file import TokenFile
from jaxlm.files.strict_json import parse_object
from jaxlm.terminal.printable import shown
from jaxlm.terminal.progress import progress_bar
from jaxlm.tokenizers.base import Tokenizer

FORMAT_VERSION = 1
_OTHER_HASH = "its contents do not have the hash in meta.json"


@dataclass(frozen=True)
class CachedTokens:
    """The tokens of a source."""

    folder: Path
    """Folder of the cache entry."""
    tokens: TokenFile
    """Ids of all documents, one document after the other."""
    documents: Int64[np.ndarray, "documents"]
    """Offset of each document's first token; the first is 0."""
    content_hash: str
    """SHA-256 (hex) of tokens and documents."""


def tokenize_source(
    source: Source, hashes: Sequence[str], tokenizer: Tokenizer, config: DataConfig
) -> CachedTokens:
    """Returns the tokens of a source; encodes them, with progress, if not in the cache.

    Args:
      hashes: the `content_hashes` of its files.
      config: `field`, `invalid_utf8`, `cache_dir`, `workers`, and `old_tokens`, with
        which nothing is encoded.

    Raises:
      ValueError: for anything wrong in the files, and for a cache that cannot be used.
    """
    key = key_of(
        "tokens",
        FORMAT_VERSION,
        PART_CHARACTERS,
        [[f.format, f.compression] for f in source.files],
        list(hashes),
        config.field,
        config.invalid_utf8,
        tokenizer.fingerprint,
        _first_id(tokenizer),
        tokenizer.eos_id,
    )

    def build(folder: Path) -> None:
        _build(folder, source, tokenizer, config)
        check_unchanged(source.files, hashes)

    def read(folder: Path) -> CachedTokens:
        return open_tokens(folder, tokenizer.vocab_size)

    return read_or_build(config, source.name, key, build, read)


def _first_id(tokenizer: Tokenizer) -> int | None:
    """The id before each document, for models that expect one; else None."""
    return tokenizer.bos_id if tokenizer.adds_bos else None


def open_tokens(folder: Path, vocab_size: int) -> CachedTokens:
    """Opens a cache entry and checks it, with all hashes.

    Raises:
      DamagedEntry: when a file is missing, truncated or changed.
    """
    meta = _read_meta(folder)
    dtype, path = _dtype(vocab_size), folder / "tokens.bin"
    if meta["dtype"] != dtype.str:
        raise DamagedEntry(
            folder / "meta.json", f"ids are {shown(meta['dtype'])}, not {dtype.str}"
        )
    tokens = TokenFile(path, dtype, meta["num_tokens"], meta["sha256"])
    documents = _read_documents(folder / "documents.npy", meta)
    return CachedTokens(folder, tokens, documents, meta["content_hash"])


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    try:
        meta = parse_object(path.read_bytes(), "its text")
        keys = {"num_tokens": int, "num_documents": int, "dtype": str}
        keys |= {"sha256": str, "content_hash": str}
        if any(not isinstance(meta[k], kind) for k, kind in keys.items()):
            raise KeyError("a value has the wrong type")
    except OSError as error:
        raise DamagedEntry(path, f"it cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedEntry(path, f"it cannot be read ({error})") from None
    return meta


def _read_documents(path: Path, meta: dict) -> Int64[np.ndarray, "documents"]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedEntry(path, f"it cannot be read ({error.strerror})") from None
    # Behind the header, in which NumPy's own reader trips over damage.
    size = 8 * meta["num_documents"]
    documents = np.frombuffer(data[-size:], np.int64) if size <= len(data) else None
    if (
        documents is None
        or _content_hash(meta["sha256"], documents) != (meta["content_hash"])
    ):
        raise DamagedEntry(path, _OTHER_HASH)
    return documents


def _content_hash(tokens_hash: str, documents: Int64[np.ndarray, "documents"]) -> str:
    return key_of(tokens_hash, hashlib.sha256(documents).hexdigest())


def _build(
    folder: Path, source: Source, tokenizer: Tokenizer, config: DataConfig
) -> None:
    total = sum(f.path.stat().st_size for f in source.files)
    starts, num_tokens = array("q"), 0
    dtype = _dtype(tokenizer.vocab_size)
    title = f"tokenizing {source.name}"
    digest = hashlib.sha256()
    # Close the generator on any failure, so that no worker process outlives an error.
    encoded = contextlib.closing(encode_source(source, tokenizer, folder, config))
    with (
        open(folder / "tokens.bin", "wb") as out,
        progress_bar(title, total) as show,
        encoded as parts,
    ):
        document_start = 0
        for part, ids in parts:
            if part.starts:
                document_start = num_tokens
            first = _first_id(tokenizer) if part.starts else None
            last = tokenizer.eos_id if part.ends else None
            begin, end = ([] if i is None else [i] for i in (first, last))
            data = np.concatenate([begin, ids, end], dtype=dtype, casting="unsafe")
            out.write(data)
            digest.update(data)
            num_tokens += len(data)
            # Skip a document without any token.
            if part.ends and num_tokens > document_start:
                starts.append(document_start)
            show(part.done)
    if not num_tokens:
        raise ValueError(f"{source.name}: the text has no tokens")
    documents = np.frombuffer(starts, np.int64)
    np.save(folder / "documents.npy", documents)
    meta = {
        "num_tokens": num_tokens,
        "num_documents": len(documents),
        "dtype": dtype.str,
        "sha256": digest.hexdigest(),
        "content_hash": _content_hash(digest.hexdigest(), documents),
        "files": [str(f.path) for f in source.files],
        "tokenizer": tokenizer.fingerprint,
    }
    text = json.dumps(meta, indent=1) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")
