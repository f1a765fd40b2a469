"""Folders of safetensors files in the layout of Hugging Face: one file, or shards.

The index `model.safetensors.index.json` maps each tensor to its shard.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlm.checkpoint.hf.safetensors_file import (
    MAX_HEADER_BYTES,
    check_values,
    read_safetensors,
    write_safetensors,
)
from jaxlm.checkpoint.tensor_file import (
    MAX_TENSORS,
    ReadTensor,
    StoredTensor,
    TensorSpecs,
    WeightFile,
    number_of_values,
)
from jaxlm.files.durable import replacing
from jaxlm.files.folder_links import path_inside
from jaxlm.files.strict_json import parse_object
from jaxlm.terminal.printable import shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = "model-{:05d}-of-{:05d}.safetensors"


def read_folder(folder: Path | str) -> dict[str, StoredTensor]:
    """Reads the headers of the weight files in a model folder.

    Args:
      folder: contains model.safetensors, or model.safetensors.index.json and the shards
        that it names. Links to files outside are rejected, except those of a snapshot
        in the Hugging Face hub cache.

    Returns:
      The tensors of all shards by name.

    Raises:
      ValueError: if there are no safetensors (pickles are never loaded), if a file
        violates the format, and if index and shards disagree.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    try:
        if _exists(folder / SINGLE_FILE):
            return read_safetensors(path_inside(folder, SINGLE_FILE))[0]
        if not _exists(folder / INDEX_FILE):
            raise ValueError(_no_weights(folder))
        index = folder / INDEX_FILE
        shard_of = _read_index(index, path_inside(folder, INDEX_FILE))
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(shard_of.values())):
            found = read_safetensors(path_inside(folder, shard))[0]
            for name in found:
                indexed = shard_of.get(name, "no shard")
                if indexed != shard:
                    raise ValueError(
                        f"{index}: tensor {shown(name)} is in {shard}, but the index "
                        f"has it in {indexed}"
                    )
            tensors |= found
        for name, shard in shard_of.items():
            if name not in tensors:
                raise ValueError(f"{index}: tensor {shown(name)} is not in {shard}")
    except OSError as e:
        raise ValueError(f"{folder}: cannot be read: {e.strerror}") from e
    return tensors


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _no_weights(folder: Path) -> str:
    for pattern in _PICKLES:
        for path in sorted(folder.glob(pattern)):
            return (
                f"{path}: jaxlm does not load pickles, which can run code; convert it "
                "in a separate environment with transformers: from_pretrained"
                "(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
            )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there"


def _read_index(index: Path, path: Path) -> dict[str, str]:
    """Reads the shard of each tensor, and checks that shards are plain file names."""
    file = WeightFile(path)
    if file.size > MAX_HEADER_BYTES:
        raise ValueError(f"{index}: larger than {MAX_HEADER_BYTES} bytes")
    text, where = file.bytes(0, file.size), f"{index}: the index"
    check_values(text, where)
    shard_of = parse_object(text, where, allow_nan=False).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index}: weight_map is not a JSON object with tensors")
    if len(shard_of) > MAX_TENSORS:
        raise ValueError(f"{index}: {len(shard_of)} tensors, more than {MAX_TENSORS}")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not _is_shard_name(shard):
            raise ValueError(
                f"{index}: the shard of {shown(name)} is {shown(shard)}, not the plain "
                "name of a .safetensors file"
            )
    return shard_of


def _is_shard_name(name: str) -> bool:
    plain = name.isprintable() and not set(name) & set("/\\:") and name[:1] != "."
    return plain and name.endswith(".safetensors") and len(name.encode()) < 256


def write_folder(
    folder: Path | str,
    specs: TensorSpecs,
    read: ReadTensor,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes the weights of a model in the layout of Hugging Face.

    Args:
      folder: created if missing; may contain other files, but no weights.
      specs: as in `write_safetensors`; shards are filled in this order.
      read: as in `write_safetensors`.
      max_shard_bytes: larger models are split into shards with an index. A tensor that
        is larger gets its own shard.
      metadata: as in `write_safetensors`, for each file.

    Returns:
      The files. The index is last: without it, the shards of a half-written folder are
      not read.

    Raises:
      ValueError, OSError: as `write_safetensors`, and if the folder has weights.
    """
    folder = Path(os.path.expanduser(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            raise ValueError(f"{path}: already exists; choose an empty folder")
    shards = _split(specs, max_shard_bytes)
    if len(shards) <= 1:
        write_safetensors(folder / SINGLE_FILE, specs, read, metadata)
        return [folder / SINGLE_FILE]
    written: list[Path] = []
    try:
        shard_of: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            path = folder / _SHARD.format(number, len(shards))
            write_safetensors(path, {n: specs[n] for n in names}, read, metadata)
            written.append(path)
            shard_of |= dict.fromkeys(names, path.name)
        total = sum(_bytes(specs[name]) for name in specs)
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        with replacing(folder / INDEX_FILE) as file:
            file.write(text.encode())
    except BaseException:
        for path in written:
            path.unlink()
        raise
    return [*written, folder / INDEX_FILE]


def _split(specs: TensorSpecs, max_bytes: int) -> list[list[str]]:
    """Splits the names, in order, into lists of at most `max_bytes` where possible."""
    if max_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_bytes}; it must be positive")
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + _bytes(spec) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(spec)
    return shards


def _bytes(spec: tuple[tuple[int, ...], np.dtype]) -> int:
    shape, dtype = spec
    return number_of_values(shape, "a tensor") * dtype.itemsize
