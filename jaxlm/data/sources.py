"""The files of a `data.path`: named files, folders and globs.

Each entry of `data.path` is one source: an ordered list of files.
"""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxlm.fields import nearest

BUNDLED = "bundled:"
_RUN_FOLDERS = ("checkpoints", "tensorboard", "wandb", "mlflow")
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
COMPRESSIONS = (".gz", ".zst")
# Suffix -> format, where it is not plain text.
_FORMATS = {".jsonl": ".jsonl", ".ndjson": ".jsonl", ".parquet": ".parquet"}
_PROSE = ".txt .text .md .markdown .rst .tex .org .adoc"
_CODE = """.c .cc .cpp .cs .cu .go .h .hpp .hs .java .jl .js .jsx .kt .lua .ml .php .pl
    .py .pyi .r .rb .rs .scala .sh .sql .swift .ts .tsx"""
TEXT_KINDS = frozenset(f"{_PROSE} {_CODE}".split())
"""Suffixes of the plain text that is read from folders: prose and source code."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextFile:
    """A file of text."""

    path: Path
    """Path of the file."""
    format: str
    """.txt (any plain text), .jsonl or .parquet."""
    compression: str
    """.gz, .zst or ""."""


@dataclass(frozen=True)
class Source:
    """The files of one entry of `data.path`, in reading order."""

    name: str
    """The entry as written."""
    files: tuple[TextFile, ...]
    """At least one file."""


def find_source(entry: str) -> Source:
    """Returns the files of one entry of `data.path`.

    A file that is named, also by a glob, is plain text unless its suffix says
    otherwise. From a folder the kinds in `TEXT_KINDS`, JSON lines and Parquet are read;
    the log says which other files it holds. Hidden files are ignored.

    Args:
      entry: `bundled:NAME`, a file, a folder (all text files below it, sorted) or a
        glob (`**` crosses folders).

    Raises:
      ValueError: when nothing is found.
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
    path = Path(os.path.expanduser(entry))
    if path.is_dir():
        return Source(entry, _files_below(path))
    if path.exists():
        if not path.is_file():
            raise ValueError(
                f"data.path: {entry!r} is not a file but a pipe or a device, and text "
                "is read more than once: write it to a file first"
            )
        return Source(entry, (_text_file(path),))
    if glob.has_magic(entry):
        found = sorted(set(_expand(str(path))))
        named = [Path(f) for f in found if os.path.isfile(f)]
        files = tuple(_text_file(f) for f in named if f.stat().st_size)
        if not files:
            what = "only empty files match" if named else "no file matches"
            raise ValueError(f"data.path: {what} the glob {entry!r}")
        return Source(entry, files)
    raise ValueError(f"data.path: {entry!r} does not exist{_nearest_path(path)}")


def _expand(pattern: str) -> Iterator[str]:
    """Yields the paths that match a glob; reads a folder once, however it is linked.

    The standard library follows links in a circle, forty levels deep.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        _check_readable(parts)
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    rest, seen = parts[at + 1 :] or ("*",), set()
    for base in glob.glob(str(Path(*parts[:at]))):
        for folder, below, _ in os.walk(base, onerror=_refuse, followlinks=True):
            real = os.path.realpath(folder)
            below[:] = () if real in seen else sorted(n for n in below if n[0] != ".")
            if real not in seen:
                seen.add(real)
                yield from _expand(str(Path(glob.escape(folder), *rest)))


def _check_readable(parts: tuple[str, ...]) -> None:
    """Raises ValueError for a folder on the way that the library would leave out."""
    for number, part in enumerate(parts[1:], start=1):
        needed = os.X_OK | (os.R_OK if glob.has_magic(part) else 0)
        for folder in glob.glob(str(Path(*parts[:number]))):
            if os.path.isdir(folder) and not os.access(folder, needed):
                raise ValueError(
                    f"data.path: the folder {folder} cannot be read: fix its "
                    "permissions, or name the others"
                )


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from None


def suffixes(path: Path) -> tuple[str, str]:
    """Returns the suffixes of kind and of compression, in lower case, or ""."""
    last = [s.lower() for s in path.suffixes[-2:]]
    compression = last.pop() if last and last[-1] in COMPRESSIONS else ""
    return (last[-1] if last else ""), compression


def _text_file(path: Path) -> TextFile:
    kind, compression = suffixes(path)
    if kind == ".parquet" and compression:
        raise ValueError(
            f"{path}: a Parquet file inside {compression} cannot be read: decompress it"
        )
    return TextFile(path, _FORMATS.get(kind, ".txt"), compression)


def _files_below(folder: Path) -> tuple[TextFile, ...]:
    read, skipped, files = Counter[str](), Counter[str](), []
    paths = []
    for inside, below, names in os.walk(folder, onerror=_refuse):
        # What a run writes is no text, and differs at each start.
        if "checkpoints" in below and {".lock", "metrics.jsonl"} & {*names}:
            below[:] = [name for name in below if name not in _RUN_FOLDERS]
            names = [name for name in names if not name.startswith("metrics.")]
            skipped["runs"] += 1
        below[:] = [name for name in below if name[0] != "."]
        links = sum(os.path.islink(os.path.join(inside, name)) for name in below)
        if links:
            skipped["linked folders"] += links
        paths += [Path(inside, name) for name in names if name[0] != "."]
    for path in sorted(paths):
        if not path.is_file():
            continue
        kind, compression = suffixes(path)
        known = kind in TEXT_KINDS or kind in _FORMATS
        known = known and not (kind == ".parquet" and compression)
        if known and path.stat().st_size:
            files.append(_text_file(path))
            read[kind] += 1
        else:
            name = "empty" if known else kind + compression
            skipped[name or "without a suffix"] += 1
    how = "name a file, or use a glob, to read it whatever its suffix"
    if not files:
        holds = _counted(skipped) if skipped else "nothing"
        raise ValueError(
            f"{folder}: no text in this folder, which holds {holds}; {how}"
        )
    if skipped:
        _log.warning(
            "%s: reads %s; skips %s (%s)",
            *(folder, _counted(read), _counted(skipped), how),
        )
    return tuple(files)


def _counted(counts: Mapping[str, int]) -> str:
    """Returns `3 .md, 2 .csv, 1 empty and 4 others`: the most frequent first."""
    kinds = sorted(counts, key=lambda k: (-counts[k], k))
    parts = [f"{counts[k]} {k}" for k in kinds[:5]]
    if rest := sum(counts[k] for k in kinds[5:]):
        parts.append(f"{rest} others")
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _nearest_path(path: Path) -> str:
    missing, parent = path, path.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = nearest(missing.name, names)
    if near:
        return near.replace("?)", f" in {parent.resolve()}?)")
    return f" ({missing.name!r} is not in {parent.resolve()})"
