"""Reads a step folder: the whole state, or one of its trees."""

from collections import Counter
from collections.abc import Callable, Mapping
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
# Of a tokenizer, or of Orbax's metadata of some arrays.
MAX_BYTES_BESIDE = 1 << 30
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
    """Returns `read(folder)` for the first folder that raises no UnreadableStep.

    After an error of the disk, which may be one of a network that passes, a folder is
    read once more.
    """
    broken: list[str] = []
    for folder in folders:
        try:
            try:
                result = read(folder)
            except UnreadableStep as e:
                if not _is_of_disk(e):
                    raise
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


def _is_of_disk(error: UnreadableStep) -> bool:
    # TensorStore has no exceptions of its own.
    return isinstance(error.__cause__, OSError) or "os_error_code" in str(
        error.__cause__
    )


def open_step(folder: Path) -> dict[str, Any]:
    """Returns the `meta.json` of a step whose other files are not yet hashed.

    They may be as large as their arrays, and little more: a terabyte of zeros, which
    takes no space on a disk, is not worth hashing.

    Raises:
      UnreadableStep: for damage that shows already.
      ValueError: as `read_meta`.
    """
    sizes: Counter[str] = Counter()
    for name, entry in integrity.verified_sizes(folder).items():
        sizes[name.partition("/")[0]] += entry["bytes"]
    if run_folder.META not in sizes:
        raise UnreadableStep(f"{run_folder.META} missing")
    _check_sizes({run_folder.META: sizes.pop(run_folder.META)}, {})
    integrity.verify(folder, (run_folder.META,))
    meta = read_meta(folder)
    _check_sizes(sizes, meta["arrays"])
    return meta


def _check_sizes(
    sizes: Mapping[str, int], items: Mapping[str, arrays.Description]
) -> None:
    for name, size in sizes.items():
        expected = arrays.num_bytes(items.get(name, {}))
        if size > 2 * expected + MAX_BYTES_BESIDE:
            raise UnreadableStep(
                f"{name} has {size:,} bytes, for arrays of {expected:,}"
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
    for item in {"params": 0, "opt_state": 0} | meta["arrays"]:
        arrays.check_description(meta["arrays"].get(item), f"{file}: arrays.{item}")
    return meta


def is_kept(folder: Path) -> bool:
    """Whether a step is one that the `keep_every` of its time never deletes.

    Raises:
      OSError: if it cannot be read now; later perhaps it can.
    """
    try:
        meta = read_meta(folder)
        if meta.get("is_kept") is True:
            return True
        # Earlier versions had the run's own alone.
        config = from_dict(Config, meta["config"], f"config of {folder}")
    except (FileNotFoundError, ValueError):  # Nothing can be read from it anyway.
        return False
    every = config.train.keep_every
    return every > 0 and meta["step"] % every == 0


def _check_arrays(
    folder: Path, meta: dict[str, Any], item: str, flat: Mapping[str, Any]
) -> None:
    """Raises ValueError if a tree of a step has not the arrays that are wanted.

    Orbax would cast them in silence.
    """
    lines = arrays.differences(meta["arrays"].get(item, {}), arrays.describe(flat))
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        wide = ("unset" if jax.config.jax_enable_x64 else "set") + " JAX_ENABLE_X64: "
        raise ValueError(
            f"{wide if 'float64' in lines[0] else ''}the arrays of {folder} are not "
            f"those of this run: {'; '.join(f'{item}/{x}' for x in lines[:3])}{more}"
        )


def read_item(folder: Path, meta: dict[str, Any], item: str, wanted: Any) -> Any:
    """Reads one tree of a step, in the structure and on the shardings of `wanted`."""
    flat = arrays.flatten(wanted, item)
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
    meta = open_step(folder)
    if str(meta["step"]) != folder.name or meta["step"] >= 1 << 31:
        raise UnreadableStep(f"its meta.json is of step {shown_value(meta['step'])}")
    stored = from_dict(Config, meta["config"], f"config of {folder}")
    same_text = meta["data_fingerprint"] == data_fingerprint
    notes = compatible.check_config(stored, config, meta["step"], same_text=same_text)
    compatible.check_fingerprint(
        "tokenizer", meta["tokenizer_fingerprint"], tokenizer_fingerprint
    )
    compatible.check_fingerprint("data", meta["data_fingerprint"], data_fingerprint)
    wanted = {"params": params, "opt_state": opt_state}
    if "spikes" in meta["arrays"]:
        wanted["spikes"] = spikes
    for item, tree in wanted.items():
        _check_arrays(folder, meta, item, arrays.flatten(tree, item))
    integrity.verify(folder, share=(processes.index, processes.count))
    state = {item: read_item(folder, meta, item, x) for item, x in wanted.items()}
    host = arrays.on_host(state)
    # The files match the manifest, so only Orbax or the memory can be at fault.
    if host and meta.get("state_hash") not in (None, state_hash(host)):
        raise UnreadableStep("the state hash differs from the one in meta.json")
    try:
        differing = integrity.differing_shards(state, meta.get("shard_hashes", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise UnreadableStep("the shard_hashes of meta.json are damaged") from error
    if differing:
        raise UnreadableStep(f"a shard of {differing} differs from its hash")
    now = compatible.environment((params, opt_state))
    notes += compatible.environment_changes(meta["environment"], now)
    if notes:
        report(
            f"step {meta['step']} was saved under another configuration "
            f"({'; '.join(notes)}): results may not be bit-identical"
        )
    return Restored(meta["step"], **{"spikes": spikes, **state})
