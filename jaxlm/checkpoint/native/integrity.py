"""Detects damage to step folders and to restored states.

Orbax restores flipped bits of float data without an error. So each step folder has a
`manifest.json` with the SHA-256 and the size of every other file in it.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import tree
from jaxlm.files import durable
from jaxlm.files.strict_json import parse_object

MANIFEST = "manifest.json"
_FORMAT = 1


class UnreadableStep(ValueError):
    """A step folder is damaged; the message is a short reason."""


def write_manifest(folder: Path) -> None:
    """Writes `manifest.json` for all files below `folder`, and syncs them to disk."""
    files = {}
    for name in sorted(_walk(folder)):
        path = folder / name
        files[name] = {"sha256": _file_hash(path), "bytes": path.stat().st_size}
        durable.sync(path)
    manifest = folder / MANIFEST
    manifest.write_bytes(_render(files))
    durable.sync(manifest)
    for parent, _, _ in os.walk(folder):
        durable.sync(Path(parent))


def verify(folder: Path, parts: Collection[str] | None = None) -> None:
    """Compares the files below `folder` with its manifest.

    Args:
      folder: a step folder.
      parts: top-level names whose contents are hashed; None means all. Names and sizes
        are always compared for all files.

    Raises:
      UnreadableStep: for a missing or additional file, for another size or content, and
        for symbolic links. Files whose names start with a dot (.DS_Store) are ignored.
    """
    if folder.is_symlink():
        raise UnreadableStep("it is a symbolic link")
    if not folder.is_dir():
        raise UnreadableStep("it is not a folder")
    try:
        files = _read_manifest(folder / MANIFEST)
        found = {n for n in _walk(folder) if not n.rpartition("/")[2].startswith(".")}
        if missing := sorted(files.keys() - found):
            raise UnreadableStep(f"{_some(missing)} missing")
        if extra := sorted(found - files.keys()):
            raise UnreadableStep(f"{_some(extra)} not in {MANIFEST}")
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise UnreadableStep(f"{name} has {size} bytes, not {entry['bytes']}")
        for name, entry in files.items():
            if parts is not None and name.partition("/")[0] not in parts:
                continue
            if _file_hash(folder / name) != entry["sha256"]:
                raise UnreadableStep(f"the SHA-256 of {name} differs from {MANIFEST}")
    except OSError as e:
        raise UnreadableStep(f"{e.strerror}: {e.filename}") from e


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if path.is_symlink() or not path.is_file():
        raise UnreadableStep(f"{MANIFEST} missing")
    content = path.read_bytes()
    try:
        manifest = parse_object(content, MANIFEST)
    except ValueError as e:
        raise UnreadableStep(str(e)) from e
    if manifest.get("format") != _FORMAT:
        raise UnreadableStep(f"{MANIFEST} is not of format {_FORMAT}")
    files = manifest.get("files")
    # A manifest has only one valid spelling: if any bit of it flips, either this fails
    # or a file does not match its entry.
    if not isinstance(files, dict) or _render(files) != content:
        raise UnreadableStep(f"{MANIFEST} is damaged")
    for entry in files.values():
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "bytes"}:
            raise UnreadableStep(f"{MANIFEST} is damaged")
    return files


def _render(files: dict[str, Any]) -> bytes:
    manifest = {"format": _FORMAT, "files": files}
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _walk(folder: Path) -> Iterator[str]:
    """Yields the relative names of all files below `folder` except the manifest."""
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise UnreadableStep(f"{relative} is a symbolic link")
            if name in files and relative != MANIFEST:
                yield relative


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def state_hash(state: Any) -> str:
    """Hashes the path, dtype, shape and bytes of every leaf with SHA-256.

    Args:
      state: any tree of arrays (jax or NumPy), fully addressable by this process.

    Returns:
      64 hexadecimal digits. Two states have the same hash only if they are equal bit
      for bit, on whatever devices.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(tree.flatten(state).items()):
        value = np.ascontiguousarray(jax.device_get(leaf))
        shape = np.shape(leaf)  # ascontiguousarray adds a dimension to scalars
        digest.update(f"{name}\0{value.dtype.name}\0{shape}\0".encode())
        # Dtypes of ml_dtypes (bfloat16) do not support the buffer protocol.
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
