"""Reads the documents of text, JSON lines and Parquet files.

Files are read one document at a time, and long texts in parts: only a line of JSON or a
batch of Parquet rows has to fit into memory. Anything wrong with a file is a
`ValueError` that names the file, the line or byte, and the remedy.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxlm.data.parquet_pages import check_pages
from jaxlm.data.sources import TEXT_KINDS, TextFile, suffixes
from jaxlm.fields import nearest
from jaxlm.terminal.printable import error_line, shown

BOM = b"\xef\xbb\xbf"
# A zero among the first bytes of a file means that it is not text, as for git and grep.
_FIRST_BYTES = 8192
# Longer documents come in parts, cut after a line: to encode a gigabyte in one call
# would need many times as much memory. The cuts depend on the text only.
PART_CHARACTERS = 4_000_000
_BLOCK_BYTES = 1 << 20
# A longer line is no JSON line, but a compressed file without end or another format. It
# is held as bytes, as text and as a value, which take up to four bytes a character.
MAX_LINE_BYTES = 32 << 20
# A page of a file can hold a text once and give it to many rows.
_BATCH_ROWS = 16
# What Zstandard decompresses at once: at worst to 32 MiB, as four bytes make 128 KiB.
_ZSTD_BYTES = 1 << 10
# In its errors for what is sound, but needs an option: `zstd --ultra --long=31`, `-D`.
_ZSTD_OPTIONS = ("too much memory", "Dictionary mismatch")
# Text becomes 3 to 10 times smaller, and a log perhaps 100 times. A file of a megabyte
# that unfolds to a terabyte would be tokenized until the disk is full.
MAX_UNFOLDED_BYTES = 1 << 30
MAX_RATIO = 200
_log = logging.getLogger(__name__)


class DocumentPart(NamedTuple):
    """A part of a document, or all of it, and its origin."""

    text: str
    """Text, never empty once read by `read_documents`."""
    where: str
    """File, line (or row) and character, for messages."""
    done: int
    """Bytes of the file read so far (compressed), for progress."""
    starts: bool = True
    """True for the first part of a document."""
    ends: bool = True
    """True for the last part of a document."""


def read_documents(
    file: TextFile, field: str = "text", invalid_utf8: str = "error"
) -> Iterator[DocumentPart]:
    """Yields the documents of a file in parts, without empty ones.

    A text file is one document. A byte order mark at the start is dropped; line ends
    are kept.

    Args:
      field: field of JSON lines, or column of Parquet, that holds the text.
      invalid_utf8: `error`, or `replace` bad bytes by U+FFFD and warn once per file.

    Raises:
      ValueError: for anything wrong in the file, with its line and the remedy.
    """
    count = 0
    try:
        stored = file.path.stat().st_size
        damage = _Damage(str(file.path), stored, replace=invalid_utf8 == "replace")
        if file.format == ".parquet":
            pieces = _read_parquet(file, field, damage)
        else:
            pieces = _read_text(file, field, damage)
        for part in _cut(pieces):
            count += 1
            yield part
    except OSError as error:
        raise ValueError(f"{file.path}: cannot be read ({error.strerror})") from None
    if not count:
        raise ValueError(
            f"{file.path}: the file is empty: it has no document with text; remove it "
            "from data.path"
        )
    damage.warn()


def _cut(pieces: Iterable[DocumentPart]) -> Iterator[DocumentPart]:
    """Cuts documents after a line, wherever the pieces that they are read in end."""
    rest, before = "", 0
    for text, where, done, _, ends in pieces:
        rest, start = rest + text, 0
        while start < len(rest):
            end = start + PART_CHARACTERS
            if end < len(rest):
                end = rest.rfind("\n", start, end) + 1 or end
            elif not ends:
                break
            at = before + start
            origin = f"{where}, from character {at}" if at else where
            is_last = ends and end >= len(rest)
            yield DocumentPart(rest[start:end], origin, done, at == 0, is_last)
            start = end
        rest, before = rest[start:], 0 if ends else before + start


@dataclass
class _Damage:
    """Decodes the text of one file, and counts what was not valid UTF-8."""

    path: str
    stored: int
    """Bytes of the file, perhaps compressed."""
    replace: bool
    size: int = 0
    """Bytes that were decoded."""
    count: int = 0
    nuls: int = 0

    def decode(self, data: bytes, line: int, offset: int) -> str:
        """Decodes `data`, which begins at a line number and byte offset of the file."""
        return self.decode_block(data, line, offset, is_last=True)[0]

    def decode_block(
        self, data: bytes, line: int, offset: int, is_last: bool
    ) -> tuple[str, int]:
        """Also returns how many bytes were used.

        Unless it `is_last`, those of an incomplete character at the end are not.
        """
        try:
            text, used = codecs.utf_8_decode(data, "strict", is_last)
        except UnicodeDecodeError as error:
            if not self.replace:
                at = error.start
                line += data.count(b"\n", 0, at)
                raise ValueError(
                    f"{self.path}: byte 0x{data[at]:02x} at offset {offset + at} (line "
                    f"{line}) is not UTF-8: convert the file, or set data.invalid_utf8 "
                    "to 'replace'"
                ) from None
            text, used = codecs.utf_8_decode(data, "replace", is_last)
            real = data.count("\ufffd".encode(), 0, used)
            self.count += text.count("\ufffd") - real
        self.size += used
        if self.size > max(MAX_UNFOLDED_BYTES, MAX_RATIO * self.stored):
            raise ValueError(
                f"{self.path}: {self.stored:,} bytes unfold to {self.size:,} and more, "
                f"over {MAX_RATIO} times as many, which would fill the disk: if it is "
                "text, store it uncompressed"
            )
        self.nuls += text.count("\0")
        return text, used

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
            _log.warning(
                "%s: %d byte sequences that were not UTF-8 became U+FFFD",
                *(self.path, self.count),
            )
        if self.nuls:
            _log.warning(
                "%s: %d NUL bytes are kept as text; a crash or an incomplete copy may "
                "have left them",
                *(self.path, self.nuls),
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
            data = data or self._raw.read(_ZSTD_BYTES)
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


def _read_text(file: TextFile, field: str, damage: _Damage) -> Iterator[DocumentPart]:
    with open(file.path, "rb") as raw:
        stream = _open(file, raw)
        try:
            if file.format == ".txt":
                yield from _read_blocks(file, stream, raw, field, damage)
            else:
                yield from _read_json_lines(file, stream, raw, field, damage)
        except _damaged_archive() as error:
            if any(words in str(error) for words in _ZSTD_OPTIONS):
                raise ValueError(
                    f"{file.path}: compressed with a window or a dictionary that is "
                    f"not read here ({error}): decompress it first"
                ) from None
            raise ValueError(
                f"{file.path}: the compressed file is damaged or truncated at byte "
                f"{raw.tell()} ({error}): get it again"
            ) from None


def _read_blocks(
    file: TextFile,
    stream: io.BufferedIOBase,
    raw: io.BufferedIOBase,
    field: str,
    damage: _Damage,
) -> Iterator[DocumentPart]:
    data, line, offset = stream.read(_BLOCK_BYTES), 1, 0
    if data.startswith(BOM):
        data, offset = data[len(BOM) :], len(BOM)
    _check_is_text(file, data)
    _check_no_objects(file, field, data)
    is_last = False
    while not is_last:
        more = stream.read(_BLOCK_BYTES)
        is_last = not more
        text, used = damage.decode_block(data, line, offset, is_last)
        yield DocumentPart(text, str(file.path), raw.tell(), ends=is_last)
        line, offset = line + data.count(b"\n", 0, used), offset + used
        data = data[used:] + more


def _check_is_text(file: TextFile, data: bytes) -> None:
    """Raises ValueError for what is not text, unless the file's suffix promises it."""
    if suffixes(file.path)[0] in TEXT_KINDS:
        return
    if b"\0" in data[:_FIRST_BYTES] or data.startswith(b"%PDF-"):
        raise ValueError(
            f"{file.path}: this is a binary file, not text: remove it from data.path, "
            "or convert it to UTF-8 text"
        )


def _check_no_objects(file: TextFile, field: str, data: bytes) -> None:
    """Raises ValueError for JSON with the field of the text, which others call .json.

    As plain text its braces would be trained on too.
    """
    is_json = suffixes(file.path)[0] == ".json" and re.match(rb"\s*(\[\s*)?\{", data)
    if is_json and json.dumps(field).encode() in data:
        raise ValueError(
            f"{file.path}: it has JSON objects with the field {field!r}, and as plain "
            "text their braces too: write one on each line and name the file .jsonl, "
            "or .txt, to train on it as it is"
        )


def _read_json_lines(
    file: TextFile,
    stream: io.BufferedIOBase,
    raw: io.BufferedIOBase,
    field: str,
    damage: _Damage,
) -> Iterator[DocumentPart]:
    offset = 0
    lines = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"{file.path}, line {number}: a line of more than {MAX_LINE_BYTES} "
                "bytes: a .jsonl file has one JSON object per line"
            )
        start, offset = offset, offset + len(line)
        if number == 1:
            line = line.removeprefix(BOM)
        text = damage.decode(line, number, start)
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: this line is not JSON ({error}): a .jsonl file has one JSON "
                "object per line"
            ) from None
        document = _field_of(value, field, where)
        if text.count(json.dumps(field)) > 1 and _is_twice(text, field):
            raise ValueError(f"{where}: the field {field!r} is there twice: repair it")
        yield DocumentPart(damage.check_surrogates(document, number), where, raw.tell())


def _field_of(value: Any, field: str, where: str) -> str:
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: expected a JSON object with the field {field!r}, found "
            f"{type(value).__name__}"
        )
    if field not in value:
        raise ValueError(
            f"{where}: no field {field!r}{_which(field, 'field', value)}: set "
            "data.field"
        )
    if not isinstance(value[field], str):
        raise ValueError(
            f"{where}: the field {field!r} holds {type(value[field]).__name__}, not "
            "text: set data.field to the field that holds the text"
        )
    return value[field]


def _is_twice(text: str, field: str) -> bool:
    """Whether the outermost object has two values of a field."""
    names: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]

    json.loads(text, object_pairs_hook=keep)  # the outermost is the last
    return names.count(field) > 1


def _which(field: str, what: str, names: Iterable[str]) -> str:
    """Names the fields or columns that there are, and that which may be meant."""
    names = [shown(name) for name in itertools.islice(names, 100)]
    there = f"the {what}s are {', '.join(names[:8])}" if names else f"it has no {what}"
    return f"{nearest(field, names)}; {there}"


def _read_parquet(
    file: TextFile, field: str, damage: _Damage
) -> Iterator[DocumentPart]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{file.path}: reading .parquet files needs an extra: pip install "
            "'jaxlm[parquet]'"
        ) from None
    size = file.path.stat().st_size
    with _damaged_parquet(file, pyarrow):
        table = pyarrow.parquet.ParquetFile(file.path)
        schema = table.schema_arrow
    with table:
        _check_column(file, schema, field, pyarrow)
        with _damaged_parquet(file, pyarrow), open(file.path, "rb") as raw:
            for chunk in _chunks(table.metadata, field):
                check_pages(raw, chunk)
        row, rows = 0, max(table.metadata.num_rows, 1)
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=[field])
        while True:
            with _damaged_parquet(file, pyarrow):
                batch = next(batches, None)
            if batch is None:
                return
            for data in batch.column(0):
                row += 1
                where = f"{file.path}, row {row}"
                if not data.is_valid:
                    raise ValueError(
                        f"{where}: the column {field!r} is null: remove null rows"
                    )
                # pyarrow does not promise that a string column is UTF-8.
                stored = data.as_buffer().to_pybytes()
                try:
                    text = damage.decode(stored, 1, 0)
                except ValueError as error:
                    raise ValueError(f"row {row} of {error}") from None
                yield DocumentPart(text, where, size * row // rows)
            del batch, data  # before the next one is read


def _chunks(metadata: Any, field: str) -> Iterator[Any]:
    """Yields the chunks of a column, one in each group of rows.

    Raises:
      ValueError: for a group without it, which a whole file does not have.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = map(group.column, range(group.num_columns))
        chunk = next((c for c in columns if c.path_in_schema == field), None)
        if chunk is None:
            raise ValueError(f"no column {field!r} in group {number} of its rows")
        yield chunk


@contextlib.contextmanager
def _damaged_parquet(file: TextFile, pyarrow: Any) -> Iterator[None]:
    """Converts what pyarrow raises for damaged bytes."""
    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        words = error_line(error, 150)
        raise ValueError(
            f"{file.path}: not a complete Parquet file ({words}): get it again"
        ) from None


def _check_column(file: TextFile, schema: Any, field: str, pyarrow: Any) -> None:
    if field not in schema.names:
        raise ValueError(
            f"{file.path}: no column {field!r}{_which(field, 'column', schema.names)}: "
            "set data.field"
        )
    if schema.names.count(field) > 1:
        raise ValueError(
            f"{file.path}: two columns have the name {field!r}: rename one"
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(
            f"{file.path}: the column {field!r} holds {kind}, not text: set data.field "
            "to the column that holds the text"
        )
