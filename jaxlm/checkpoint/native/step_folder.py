"""Reads a step folder: the whole state, or one of its trees."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxlm.checkpoint.native import arrays, compatible, integrity, run_folder
from jaxlm.checkpoint.native.integrity import UnreadableStep, state_hash
from jaxlm.config import Config
from jaxlm.fields import from_dict

META_FORMAT = 1
T = TypeVar("T")


class NoUsableCheckpoint(ValueError):
    """A run has checkpoints, but none of them can be read."""


@dataclass(frozen=True)
class Restored:
    """A training state that was read from a checkpoint."""

    step: int
    params: Any
    opt_state: Any


def first_readable(
    folders: list[Path], read: Callable[[Path], T], report: Callable[[str], None]
) -> T:
    """Returns `read(folder)` for the first folder that raises no UnreadableStep."""
    broken: list[str] = []
    for folder in folders:
        try:
            result = read(folder)
        except UnreadableStep as e:
            broken.append(f"step {folder.name} unreadable ({e})")
            continue
        if broken:
            report(f"{', '.join(broken)}, using step {folder.name}")
        return result
    raise NoUsableCheckpoint(
        f"no usable checkpoint in {folders[0].parent}: {', '.join(broken)}; restore a "
        "copy, or start over with --fresh"
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads `meta.json` of a verified step; raises ValueError for another format."""
    file = folder / run_folder.META
    meta = json.loads(file.read_bytes())
    if meta.get("format") != META_FORMAT:
        raise ValueError(
            f"{file} has format {meta.get('format')}, and this jaxlm reads format "
            f"{META_FORMAT}: install the jaxlm that wrote it"
        )
    return meta


def read_item(folder: Path, meta: dict[str, Any], item: str, wanted: Any) -> Any:
    """Reads one tree of a step, in the structure and on the shardings of `wanted`."""
    flat = arrays.flatten(wanted, item)
    # Orbax would cast silently, so dtypes are compared here.
    lines = arrays.differences(meta["arrays"][item], arrays.describe(flat))
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(
            f"the arrays of {folder} are not those of this run: "
            f"{'; '.join(f'{item}/{line}' for line in lines[:3])}{more}"
        )
    read = arrays.read(folder / item, flat)
    return jax.tree.unflatten(jax.tree.structure(wanted), [read[n] for n in flat])


def read_state(
    folder: Path,
    params: Any,
    opt_state: Any,
    *,
    config: Config,
    tokenizer_fingerprint: str,
    data_fingerprint: str,
    report: Callable[[str], None],
) -> Restored:
    """Reads the whole state of a step folder; see `CheckpointManager.restore`."""
    integrity.verify(folder)
    meta = read_meta(folder)
    stored = from_dict(Config, meta["config"], f"config of {folder}")
    notes = compatible.check_config(stored, config, meta["step"])
    compatible.check_fingerprint(
        "tokenizer", meta["tokenizer_fingerprint"], tokenizer_fingerprint
    )
    compatible.check_fingerprint("data", meta["data_fingerprint"], data_fingerprint)
    state = {}
    for item, wanted in (("params", params), ("opt_state", opt_state)):
        state[item] = read_item(folder, meta, item, wanted)
    host = arrays.on_host(state)
    # The files match the manifest, so only Orbax or the memory can be at fault.
    if host and meta["state_hash"] not in (None, state_hash(host)):
        raise UnreadableStep("the state hash differs from the one in meta.json")
    now = compatible.environment((params, opt_state))
    notes += compatible.environment_changes(meta["environment"], now)
    if notes:
        report(
            f"step {meta['step']} was saved under another configuration "
            f"({'; '.join(notes)}): results may not be bit-identical"
        )
    return Restored(meta["step"], state["params"], state["opt_state"])
