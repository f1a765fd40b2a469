"""Documents from text, JSON lines and Parquet files, folders and globs.

Each entry of `data.path` is one source: an ordered list of files. Files are read one
document at a time. Anything wrong with a file is a `ValueError` that names the file,
the line or byte, and the remedy.
"""

import glob
import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import nearest

BUNDLED = "bundled:"
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"
_READABLE = ".txt, .jsonl (also .gz, .zst) and .parquet"


@dataclass(frozen=True)
class TextFile:
    """A file of text."""

    path: Path
    """Path of the file."""
    format: str
    """.txt, .jsonl or .parquet."""
    compression: str
    """.gz, .zst or ""."""


@dataclass(frozen=True)
class Source:
    """The files of one entry of `data.path`, in reading order."""

    name: str
    """The entry as written."""
    files: tuple[TextFile, ...]
    """At least one file."""


class Document(NamedTuple):
    """A document and its origin."""

    text: str
    """Text, never empty once read by `read_documents`."""
    where: str
    """File and line (or row), for messages."""
    done: int
    """Bytes of the file read so far (compressed), for progress."""


def find_source(entry: str) -> Source:
    """Returns the files of one entry of `data.path`.

    Args:
      entry: `bundled:NAME`, a file, a folder (all text files below it, sorted) or a
        glob (`**` crosses folders).

    Raises:
      ValueError: when nothing is found, or a file's extension is unknown.
    """
    if entry.startswith(BUNDLED):
        name = entry.removeprefix(BUNDLED)
        names = sorted(p.name for p in BUNDLED_FOLDER.glob("*.txt"))
        if name not in names:
            raise ValueError(
                f"data.path: no bundled text {name!r}{nearest(name, names)}: use "
                + ", ".join(BUNDLED + n for n in names)
            )
        return Source(entry, (_text_file(BUNDLED_FOLDER / name),))
    path = Path(entry).expanduser()
    if path.is_dir():
        return Source(entry, _files_below(path))
    if path.exists():
        return Source(entry, (_text_file(path),))
    if glob.has_magic(entry):
        found = sorted(glob.glob(str(path), recursive=True))
        files = tuple(_text_file(Path(f)) for f in found if os.path.isfile(f))
        if not files:
            raise ValueError(f"data.path: no file matches the glob {entry!r}")
        return Source(entry, files)
    raise ValueError(f"data.path: {entry!r} does not exist{_nearest_path(path)}")


def _suffixes(path: Path) -> tuple[str, str]:
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _is_text_file(path: Path) -> bool:
    kind, compression = _suffixes(path)
    return kind in FORMATS and not (kind == ".parquet" and compression)


def _text_file(path: Path) -> TextFile:
    if not _is_text_file(path):
        raise ValueError(
            f"{path}: files with the extension {''.join(path.suffixes[-2:])!r} cannot "
            f"be read: {_READABLE} can; rename or convert it"
        )
    return TextFile(path, *_suffixes(path))


def _files_below(folder: Path) -> tuple[TextFile, ...]:
    everything = sorted(p for p in folder.rglob("*") if p.is_file())
    files = tuple(_text_file(p) for p in everything if _is_text_file(p))
    if not files:
        others = sorted({"".join(p.suffixes[-2:]) or p.name for p in everything})
        holds = ", ".join(others[:5]) or "nothing"
        raise ValueError(
            f"{folder}: no text files in this folder ({_READABLE}): it holds {holds}"
        )
    return files


def _nearest_path(path: Path) -> str:
    missing, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = nearest(missing.name, names)
    if near:
        return near.replace("?)", f" in {parent.resolve()}?)")
    return f" ({missing.name!r} is not in {parent.resolve()})"


def read_documents(
    file: TextFile, field: str = "text", invalid_utf8: str = "error"
) -> Iterator[Document]:
    """Yields the documents of a file, without empty ones.

    A `.txt` file is one document. A byte order mark at the start is dropped; line
    ends are kept.

    Args:
      field: field of JSON lines, or column of Parquet, that holds the text.
      invalid_utf8: `error`, or `replace` bad bytes by U+FFFD and warn once per file.

    Raises:
      ValueError: for anything wrong in the file, with its line and the remedy.
    """
    count = 0
    damage = _Damage(str(file.path), replace=invalid_utf8 == "replace")
    if file.format == ".parquet":
        documents = _read_parquet(file, field, damage)
    else:
        documents = _read_text(file, field, damage)
    for document in documents:
        if document.text:
            count += 1
            yield document
    if not count:
        raise ValueError(
            f"{file.path}: the file is empty: it has no document with text; remove it "
            "from data.path"
        )
    damage.warn()


@dataclass
class _Damage:
    """Decodes the text of one file, and counts what was not valid UTF-8."""

    path: str
    replace: bool
    count: int = 0

    def decode(self, data: bytes, line: int, offset: int) -> str:
        """Decodes `data`, which begins at a line number and byte offset of the file."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if not self.replace:
                at = error.start
                line += data.count(b"\n", 0, at)
                raise ValueError(
                    f"{self.path}: byte 0x{data[at]:02x} at offset {offset + at} (line "
                    f"{line}) is not UTF-8: convert the file, or set data.invalid_utf8 "
                    "to 'replace'"
                ) from None
        text = data.decode("utf-8", errors="replace")
        self.count += text.count("\ufffd") - data.count("\ufffd".encode())
        return text

    def check_surrogates(self, text: str, line: int) -> str:
        """Checks text from JSON, whose escapes can give half of a surrogate pair."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if not self.replace:
                raise ValueError(
                    f"{self.path}, line {line}: the text has half of a surrogate pair "
                    f"(\\u{ord(text[error.start]):04x}), which is not valid Unicode: "
                    "repair it, or set data.invalid_utf8 to 'replace'"
                ) from None
            fixed = "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)
            self.count += fixed.count("\ufffd") - text.count("\ufffd")
            return fixed
        return text

    def warn(self) -> None:
        if self.count:
            warnings.warn(
                f"{self.path}: {self.count} byte sequences that were not UTF-8 became "
                "U+FFFD",
                stacklevel=3,
            )


def _open(file: TextFile, raw: io.BufferedIOBase) -> io.BufferedIOBase:
    if file.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if file.compression == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError(
                f"{file.path}: reading .zst files needs an extra: pip install "
                "'jaxlm[zst]'"
            ) from None
        frames = _ZstdFrames(raw, zstandard.ZstdDecompressor())
        return io.BufferedReader(frames, 1 << 20)
    return raw


class _ZstdFrames(io.RawIOBase):
    """Decompresses consecutive Zstandard frames, as parallel compressors write them.

    The library's own reader takes a truncated file for a complete one.
    """

    def __init__(self, raw: io.BufferedIOBase, decompressor: Any):
        self._raw, self._decompressor = raw, decompressor
        self._frame = decompressor.decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = b""
            if self._frame.eof:
                data = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._begun = False
            data = data or self._raw.read(1 << 15)
            if not data:
                if self._begun:
                    raise EOFError("the last frame is incomplete")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _damaged_archive() -> tuple[type[Exception], ...]:
    errors = (gzip.BadGzipFile, zlib.error, EOFError)
    try:
        import zstandard
    except ImportError:
        return errors
    return (*errors, zstandard.ZstdError)


def _read_text(file: TextFile, field: str, damage: _Damage) -> Iterator[Document]:
    with open(file.path, "rb") as raw:
        stream = _open(file, raw)
        try:
            if file.format == ".txt":
                data = stream.read().removeprefix(BOM)
                size = raw.tell()
                text = damage.decode(data, 1, 0)
                del data
                yield Document(text, str(file.path), size)
            else:
                yield from _read_json_lines(file, stream, raw, field, damage)
        except _damaged_archive() as error:
            raise ValueError(
                f"{file.path}: the compressed file is damaged or truncated at byte "
                f"{raw.tell()} ({error}): get it again"
            ) from None


def _read_json_lines(
    file: TextFile,
    stream: io.BufferedIOBase,
    raw: io.BufferedIOBase,
    field: str,
    damage: _Damage,
) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        start, offset = offset, offset + len(line)
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        text = damage.decode(line, number, start)
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{where}: this line is not JSON ({error}): a .jsonl file has one JSON "
                "object per line"
            ) from None
        document = _field_of(value, field, where)
        yield Document(damage.check_surrogates(document, number), where, raw.tell())


def _field_of(value: Any, field: str, where: str) -> str:
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: expected a JSON object with the field {field!r}, found "
            f"{type(value).__name__}"
        )
    if field not in value:
        raise ValueError(
            f"{where}: no field {field!r}{nearest(field, list(value))}; the fields are "
            f"{', '.join(value) or 'none'}: set data.field"
        )
    if not isinstance(value[field], str):
        raise ValueError(
            f"{where}: the field {field!r} holds {type(value[field]).__name__}, not "
            "text: set data.field to the field that holds the text"
        )
    return value[field]


def _read_parquet(file: TextFile, field: str, damage: _Damage) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{file.path}: reading .parquet files needs an extra: pip install "
            "'jaxlm[parquet]'"
        ) from None
    size = file.path.stat().st_size
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{file.path}: not a complete Parquet file ({error}): get it again"
        ) from None
    with table:
        _check_column(file, table.schema_arrow, field, pyarrow)
        row, rows = 0, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            # As bytes: pyarrow does not promise that a string column is UTF-8.
            for data in batch.column(0).cast(pyarrow.large_binary()):
                row += 1
                where = f"{file.path}, row {row}"
                if not data.is_valid:
                    raise ValueError(
                        f"{where}: the column {field!r} is null: remove null rows"
                    )
                try:
                    text = damage.decode(data.as_py(), 1, 0)
                except ValueError as error:
                    raise ValueError(f"row {row} of {error}") from None
                yield Document(text, where, size * row // rows)


def _check_column(file: TextFile, schema: Any, field: str, pyarrow: Any) -> None:
    if field not in schema.names:
        raise ValueError(
            f"{file.path}: no column {field!r}{nearest(field, schema.names)}; the "
            f"columns are {', '.join(schema.names)}: set data.field"
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(
            f"{file.path}: the column {field!r} holds {kind}, not text: set data.field "
            "to the column that holds the text"
        )
