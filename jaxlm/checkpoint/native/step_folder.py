"""Reads a step folder: the whole state, or one of its trees."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxlm.checkpoint.native import arrays, compatible, integrity, run_folder
from jaxlm.checkpoint.native.integrity import UnreadableStep, state_hash
from jaxlm.config import Config
from jaxlm.fields import from_dict
from jaxlm.files.strict_json import parse_object
from jaxlm.sharding.processes import Processes
from jaxlm.terminal.exit_codes import EXIT_NO_CHECKPOINT
from jaxlm.terminal.printable import error_line, shown_value

META_FORMAT = 1
T = TypeVar("T")


class NoUsableCheckpoint(ValueError):
    """A run has checkpoints, but none of them can be read."""

    exit_code = EXIT_NO_CHECKPOINT


@dataclass(frozen=True)
class Restored:
    """A training state that was read from a checkpoint."""

    step: int
    params: Any
    opt_state: Any
    spikes: Any = None


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
    meta = parse_object(file.read_bytes(), str(file))
    if meta.get("format") != META_FORMAT:
        raise ValueError(
            f"{file} has format {shown_value(meta.get('format'))}, and this jaxlm "
            f"reads format {META_FORMAT}: install the jaxlm that wrote it"
        )
    kinds = {"step": int, "config": dict, "arrays": dict, "environment": dict}
    kinds |= {"tokenizer_fingerprint": str, "data_fingerprint": str}
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind):
            raise ValueError(f"{file}: {name} is {shown_value(meta.get(name))}")
    for item in ("params", "opt_state"):
        arrays.check_description(meta["arrays"].get(item), f"{file}: arrays.{item}")
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
    try:
        read = arrays.read(folder / item, flat)
    except (ValueError, LookupError, TypeError, OSError) as error:
        # Its files match the manifest, so whoever wrote that wrote these.
        words = error_line(error)
        raise UnreadableStep(f"Orbax cannot read {item}: {words}") from error
    return jax.tree.unflatten(jax.tree.structure(wanted), [read[n] for n in flat])


def read_state(
    folder: Path,
    params: Any,
    opt_state: Any,
    spikes: Any,
    *,
    config: Config,
    tokenizer_fingerprint: str,
    data_fingerprint: str,
    report: Callable[[str], None],
    processes: Processes,
) -> Restored:
    """Reads the whole state of a step folder; see `CheckpointManager.restore`.

    Each of several processes hashes its share of the files.
    """
    integrity.verify(folder, share=(processes.index, processes.count))
    meta = read_meta(folder)
    stored = from_dict(Config, meta["config"], f"config of {folder}")
    notes = compatible.check_config(stored, config, meta["step"])
    compatible.check_fingerprint(
        "tokenizer", meta["tokenizer_fingerprint"], tokenizer_fingerprint
    )
    compatible.check_fingerprint("data", meta["data_fingerprint"], data_fingerprint)
    wanted = {"params": params, "opt_state": opt_state}
    if "spikes" in meta["arrays"]:
        wanted["spikes"] = spikes
    state = {item: read_item(folder, meta, item, x) for item, x in wanted.items()}
    host = arrays.on_host(state)
    # The files match the manifest, so only Orbax or the memory can be at fault.
    if host and meta["state_hash"] not in (None, state_hash(host)):
        raise UnreadableStep("the state hash differs from the one in meta.json")
    if differing := integrity.differing_shards(state, meta.get("shard_hashes", {})):
        raise UnreadableStep(f"a shard of {differing} differs from its hash")
    now = compatible.environment((params, opt_state))
    notes += compatible.environment_changes(meta["environment"], now)
    if notes:
        report(
            f"step {meta['step']} was saved under another configuration "
            f"({'; '.join(notes)}): results may not be bit-identical"
        )
    return Restored(meta["step"], **{"spikes": spikes, **state})
