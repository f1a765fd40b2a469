"""Detects damage to step folders and to restored states.

Orbax restores flipped bits of float data without an error. So each step folder has a
`manifest.json` with the SHA-256 and the size of every other file in it.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import tree
from jaxlm.files import durable
from jaxlm.files.strict_json import parse_object

MANIFEST = "manifest.json"
_MAX_BYTES = 64 << 20  # of a manifest: 400,000 files
_FORMAT = 1
# Every name of a file or folder that Orbax, a tokenizer or this package has written
# matches. What systems and programs leave in each folder does not: .DS_Store, .nfs0001,
# @eaDir, "meta (1).json", meta-HOST.json, but for these.
_OWN_NAME = re.compile(r"(?!(desktop\.ini|(eh)?thumbs\.db)$)[a-z0-9_][a-z0-9_.]*", re.I)


class UnreadableStep(ValueError):
    """A step folder is damaged; the message is a short reason."""


Entry = dict[str, Any]
Share = tuple[int, int]
"""(i, n): every n-th file, from the i-th on."""


def manifest_entries(folder: Path, share: Share = (0, 1)) -> dict[str, Entry]:
    """Hashes the files below `folder`, or a share of them, and syncs them to disk."""
    files = {}
    for name in sorted(_walk(folder))[share[0] :: share[1]]:
        path = folder / name
        files[name] = {"sha256": _file_hash(path), "bytes": path.stat().st_size}
        durable.sync(path)
    return files


def write_manifest(folder: Path, entries: dict[str, Entry] | None = None) -> None:
    """Writes `manifest.json` of all files below `folder`, and syncs it to disk.

    Args:
      entries: all of `manifest_entries`; None hashes the files here.
    """
    manifest = folder / MANIFEST
    manifest.write_bytes(_render(entries or manifest_entries(folder)))
    durable.sync(manifest)
    for parent, _, _ in os.walk(folder, onerror=_refuse):
        durable.sync(Path(parent))


def verify(
    folder: Path, parts: Collection[str] | None = None, share: Share = (0, 1)
) -> None:
    """Compares the files below `folder` with its manifest.

    Args:
      folder: a step folder.
      parts: top-level names whose contents are hashed; None means all. Names and sizes
        are always compared for all files.
      share: of these, the files whose contents this process hashes.

    Raises:
      UnreadableStep: as `verified_sizes`, and for another content.
    """
    files = verified_sizes(folder)
    try:
        for name in list(files)[share[0] :: share[1]]:
            if parts is not None and name.partition("/")[0] not in parts:
                continue
            if _file_hash(folder / name) != files[name]["sha256"]:
                raise UnreadableStep(f"the SHA-256 of {name} differs from {MANIFEST}")
    except OSError as e:
        raise UnreadableStep(f"{e.strerror}: {e.filename}") from e


def verified_sizes(folder: Path) -> dict[str, Entry]:
    """Returns the manifest, after a comparison of the names and sizes of the files.

    Raises:
      UnreadableStep: for a missing file, for another size, for an additional file
        among those of an array or a tokenizer, and for symbolic links. What systems
        leave in each folder (.DS_Store, @eaDir), what lies beside the step's own files,
        and data of arrays that nothing names are ignored.
    """
    if folder.is_symlink():
        raise UnreadableStep("it is a symbolic link")
    if not folder.is_dir():
        raise UnreadableStep("it is not a folder")
    try:
        files = _read_manifest(folder / MANIFEST)
        found = set(_walk(folder))
        own = {n.partition("/")[0] for n in files}
        if missing := sorted(files.keys() - found):
            raise UnreadableStep(f"{_some(missing)} missing")
        extra = sorted(
            n
            for n in found - files.keys()
            if n.partition("/")[0] in own and not _is_of_earlier_copy(n)
        )
        if extra:
            raise UnreadableStep(f"{_some(extra)} not in {MANIFEST}")
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise UnreadableStep(f"{name} has {size} bytes, not {entry['bytes']}")
    except OSError as e:
        raise UnreadableStep(f"{e.strerror}: {e.filename}") from e
    return files


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if path.is_symlink() or not path.is_file():
        raise UnreadableStep(f"{MANIFEST} missing")
    if path.stat().st_size > _MAX_BYTES:
        raise UnreadableStep(f"{MANIFEST} has more than {_MAX_BYTES} bytes")
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


def _refuse(error: OSError) -> None:
    raise error  # os.walk would leave out what it cannot list


def _walk(folder: Path) -> Iterator[str]:
    """Yields the relative names of the files below `folder` except the manifest."""
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = filter(_is_own, folders)
        for name in [*folders, *filter(_is_own, files)]:
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise UnreadableStep(f"{relative} is a symbolic link")
            if name in files and relative != MANIFEST:
                yield relative


def _is_own(name: str) -> bool:
    return _OWN_NAME.fullmatch(name) is not None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_of_earlier_copy(name: str) -> bool:
    """Whether a file is one of Orbax's data, which are read only if they are named.

    Their names are random, so that those of a step stay when a copy of it, saved
    another time, is laid over it.
    """
    return name.rpartition("/")[0].endswith("/d")


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
        _add(digest, name, np.shape(leaf), jax.device_get(leaf))
    return digest.hexdigest()


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins what several processes have hashed."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, entry in part.items():
            whole[name] = {**whole.get(name, {}), **entry}
    return whole


def _add(digest: Any, name: str, shape: tuple[int, ...], array: Any) -> None:
    # ascontiguousarray adds a dimension to scalars.
    value = np.ascontiguousarray(array)
    digest.update(f"{name}\0{value.dtype.name}\0{shape}\0".encode())
    # Dtypes of ml_dtypes (bfloat16) do not support the buffer protocol.
    digest.update(value.reshape(-1).view(np.uint8).data)


def shard_hashes(state: Any) -> dict[str, dict[str, str]]:
    """Hashes each shard of a state that this process writes.

    Returns:
      Path name -> bounds of the shard, as `0:4,8:16` -> SHA-256.
    """
    return {
        name: {
            _bounds(shard.index, leaf.shape): _shard_hash(name, shard.data)
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        }
        for name, leaf in tree.flatten(state).items()
    }


def differing_shards(state: Any, hashes: dict[str, dict[str, str]]) -> str | None:
    """Returns the name of an array of which a shard has not its hash; None if all do.

    Shards are compared that lie in one shard of `state` in this process, whatever mesh
    they were saved on; of the others the hashes of the files have to suffice.
    """
    for name, leaf in tree.flatten(state).items():
        for bounds, sha256 in hashes.get(name, {}).items():
            wanted = _slices(bounds)
            for shard in getattr(leaf, "addressable_shards", ()):
                held = _slices(_bounds(shard.index, leaf.shape))
                pairs = list(zip(wanted, held, strict=True))
                if all(h.start <= w.start and w.stop <= h.stop for w, h in pairs):
                    inside = [
                        slice(w.start - h.start, w.stop - h.start) for w, h in pairs
                    ]
                    # The part is taken by NumPy: JAX would use all devices of the mesh.
                    data = np.asarray(shard.data)[tuple(inside)]
                    if _shard_hash(name, data) != sha256:
                        return name
                    break
    return None


def _shard_hash(name: str, data: Any) -> str:
    digest = hashlib.sha256()
    _add(digest, name, data.shape, data)
    return digest.hexdigest()


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    spans = (s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
    return ",".join(f"{start}:{stop}" for start, stop in spans)


def _slices(bounds: str) -> list[slice]:
    spans = (span.split(":") for span in bounds.split(",") if bounds)
    return [slice(int(start), int(stop)) for start, stop in spans]
