"""What the texts of a run were when it began, so that a change is seen and named."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig
from jaxlm.data.disk_cache import FULL_HASH_BYTES, content_hashes
from jaxlm.data.sources import Source, TextFile, find_source
from jaxlm.files.bounded import read_bounded
from jaxlm.files.durable import replacing
from jaxlm.files.strict_json import parse

FILE_NAME = "texts.json"
MAX_BYTES = 1 << 30  # a million files have a quarter of it
_REMEDY = (
    "data.old_tokens goes on with the tokens of the text as it was, if they are still "
    "in the cache; or restore the text, or start a new run with --train.run-dir NEW "
    "(--init-from RUN gives it these weights)"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextRecord:
    """The files of a source at some time."""

    source: Source
    """The files, in reading order."""
    sizes: tuple[int, ...]
    """Bytes of each file."""
    hashes: tuple[str, ...]
    """The `content_hashes` of the files."""


def current_texts(
    config: DataConfig, began: Sequence[TextRecord] | None
) -> tuple[TextRecord, ...]:
    """Returns the texts to train on: those of now, or of a run's begin.

    Args:
      config: `path`, and `old_tokens` to take `began`, whatever has changed since.
      began: the texts when the run began; None for a new run.

    Raises:
      ValueError: if a text does not exist, or is not the one that the run began with;
        names what has changed.
    """
    same_paths = began and tuple(r.source.name for r in began) == config.path
    if config.old_tokens:
        if not (began and same_paths):
            raise ValueError(
                "data.old_tokens is for a run that began with this data.path, and "
                f"there is none with a {FILE_NAME}: leave it out"
            )
        return tuple(began)
    try:
        now = tuple(map(_record, config.path))
    except ValueError as error:
        if not same_paths:
            raise
        raise ValueError(f"{error}; {_REMEDY}") from None
    # Another data.path is refused by the check of the config.
    pairs = zip(began, now, strict=True) if began and same_paths else ()
    if changes := [line for pair in pairs for line in _changes(*pair)]:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"the text has changed since the run began: {', '.join(changes[:3])}{more}"
            f": {_REMEDY}"
        )
    return now


def _record(entry: str) -> TextRecord:
    source = find_source(entry)
    hashes = content_hashes(source.files)
    sizes = tuple(file.path.stat().st_size for file in source.files)
    return TextRecord(source, sizes, tuple(hashes))


def _changes(began: TextRecord, now: TextRecord) -> list[str]:
    old, new = (
        {
            str(file.path): (size, digest)
            for file, size, digest in zip(
                r.source.files, r.sizes, r.hashes, strict=True
            )
        }
        for r in (began, now)
    )
    lines = [f"{path} (removed)" for path in old if path not in new]
    lines += [f"{path} (new)" for path in new if path not in old]
    for path in old.keys() & new.keys():
        (size, digest), (new_size, new_digest) = old[path], new[path]
        if size != new_size:
            lines.append(f"{path} ({size:,} -> {new_size:,} bytes)")
        # The hash of a larger file has its time, which may change alone: then the
        # tokens, made again, are compared.
        elif digest != new_digest and size <= FULL_HASH_BYTES:
            lines.append(f"{path} (other contents)")
    return sorted(lines)


def write_record(run: Path, texts: Sequence[TextRecord]) -> None:
    """Writes the record of a run.

    Raises:
      OSError: if it cannot be written.
    """
    rows = [
        {
            "path": record.source.name,
            "files": [
                {**asdict(file), "path": str(file.path), "size": size, "hash": digest}
                for file, size, digest in zip(
                    record.source.files, record.sizes, record.hashes, strict=True
                )
            ],
        }
        for record in texts
    ]
    with replacing(run / FILE_NAME) as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())


def read_record(run: Path) -> tuple[TextRecord, ...] | None:
    """Reads the record of a run; None if there is none, or, with a warning, damaged."""
    path = run / FILE_NAME
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")  # a pipe would be waited for
        return tuple(map(_from_json, parse(read_bounded(path, MAX_BYTES), "its text")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        # The checkpoint has the fingerprint of the tokens, which is checked as well.
        logger.warning("%s cannot be read (%s): texts are not compared", path, error)
        return None


def _from_json(row: Any) -> TextRecord:
    files = tuple(
        TextFile(Path(f["path"]), str(f["format"]), str(f["compression"]))
        for f in row["files"]
    )
    sizes = tuple(int(f["size"]) for f in row["files"])
    hashes = tuple(str(f["hash"]) for f in row["files"])
    return TextRecord(Source(str(row["path"]), files), sizes, hashes)
