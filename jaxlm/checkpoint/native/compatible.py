"""Checks whether a run may continue from a checkpoint: config, data, environment."""

import contextlib
import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import EXECUTION_FIELDS, Config, TrainConfig
from jaxlm.fields import diff, from_dict
from jaxlm.ops.linear import compute_dtype

# Fields that do not affect the numbers of a run.
_FREE_DATA = ("workers", "prefetch", "cache_dir", "old_tokens")
# Files whose contents the fingerprint of the data covers, wherever they are.
_FILES = ("path", "tokenizer", "tokenizer_model")
_FREE_TRAIN = (
    *("log_every", "eval_every", "sample_every", "sample_prompt", "sample_tokens"),
    *("look_every", "look_text"),
    *("checkpoint_every", "checkpoint_minutes", "keep", "keep_every"),
    *("eval_batches", "max_minutes", "run_dir", "log_to", "compile_cache"),
    "on_save_error",
)
# Fields that affect only the order of floating-point operations.
_ROUNDING_TRAIN = ("accumulation_steps", "accumulate_whole", "loss_chunk")

# Flags of JAX that change the numbers of a run, on some devices or on all.
_JAX_FLAGS = (
    *("jax_enable_x64", "jax_default_matmul_precision"),
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxlm")


def check_config(
    old: Config, new: Config, step: int, *, same_text: bool = False
) -> list[str]:
    """Compares the config of a checkpoint with that of the run that continues from it.

    Args:
      old: the config of the checkpoint.
      new: the config of the run.
      step: the step of the checkpoint.
      same_text: whether the fingerprint of the data is that of the checkpoint: then
        files may have moved.

    Returns:
      Lines `field: old -> new` for differences that affect only rounding.

    Raises:
      ValueError: for differences that would make it another run.
    """
    rounding = _ROUNDING_TRAIN
    if old.train.load_balance_loss:
        rounding = (
            "accumulate_whole",
            "loss_chunk",
        )  # each part of a batch has its own balance loss
    train = (*_FREE_TRAIN, *rounding, "steps", "skip_batches")
    if new.train.skip_spikes:  # Off, the count of skipped steps would be lost.
        train += ("skip_spikes",)
    free = (*_FREE_DATA, *(_FILES if same_text else ()))
    data = [f"data.{line}" for line in diff(old.data, new.data, free)]
    steps = _steps_line(old, new, step)
    # Of what follows from another setting, only the setting is named.
    model = (*EXECUTION_FIELDS, *(["vocab_size"] if data else []))
    optimizer = ("warmup_steps",) if steps else ()
    lines = [f"model.{line}" for line in diff(old.model, new.model, model)] + data
    lines += [
        f"optimizer.{line}" for line in diff(old.optimizer, new.optimizer, optimizer)
    ]
    lines += [f"train.{line}" for line in diff(old.train, new.train, train)] + steps
    lines += _skipped_line(old.train, new.train, step)
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(
            f"the run in {new.train.run_dir} has another config "
            f"({'; '.join(lines[:3])}{more}): {_remedy('set it back')}"
        )
    other_model = _all_but(old.model, EXECUTION_FIELDS)
    other_train = _all_but(old.train, rounding)
    lines = [f"model.{line}" for line in diff(old.model, new.model, other_model)]
    return lines + [f"train.{line}" for line in diff(old.train, new.train, other_train)]


def is_repeated(values: Mapping[str, Any], new: Config) -> bool:
    """Whether a run is the same as an earlier one, of which there are no steps.

    Args:
      values: the contents of the `config.json` of the earlier run.
      new: the config of the run.
    """
    try:
        old = from_dict(Config, values)
    except ValueError:
        return False
    free = (*_FREE_DATA, *_FREE_TRAIN, *_ROUNDING_TRAIN, *EXECUTION_FIELDS)
    # What differs from one start of a run to the next.
    return not diff(old, new, (*free, "mesh", "processes", "profile", "fresh"))


def _steps_line(old: Config, new: Config, step: int) -> list[str]:
    """Returns a line if another number of steps would have given other steps so far."""
    steps = old.train.steps, new.train.steps
    begins = [old.optimizer.first_decayed(count) for count in steps]
    begin = min((b for b in begins if b is not None), default=step)
    line = f"train.steps: {steps[0]} -> {steps[1]}"
    if steps[0] == steps[1]:
        return []
    if step > begin:
        return [
            f"{line}, on which the {old.optimizer.schedule} schedule has depended "
            f"since step {begin}"
        ]
    warmups = old.optimizer.warmup_steps, new.optimizer.warmup_steps
    if warmups[0] != warmups[1]:
        return [f"{line}, with a warm-up of {warmups[0]} -> {warmups[1]} steps"]
    return []


def _skipped_line(old: TrainConfig, new: TrainConfig, step: int) -> list[str]:
    """Returns a line if other steps so far would have had other batches."""
    past = [
        [r for r in train.skipped_batches if step and r.start <= train.batch_of(step)]
        for train in (old, new)
    ]
    if past[0] == past[1]:
        return []
    shown = (" ".join(train.skip_batches) or "none" for train in (old, new))
    return [
        f"train.skip_batches: {' -> '.join(shown)}, but the first {step} steps have "
        "had other batches; --resume-step goes back to an earlier one"
    ]


def check_fingerprint(what: str, old: str, new: str) -> None:
    """Raises ValueError if the data or the tokenizer is not the checkpoint's."""
    if old != new:
        raise ValueError(
            f"the {what} is not the one that the checkpoint was trained with "
            f"(fingerprint {old[:12]} -> {new[:12]}): "
            f"{_remedy(f'restore the old {what}')}"
        )


def _remedy(undo: str) -> str:
    return (
        "start a new run with --train.run-dir NEW (--init-from RUN gives it these "
        f"weights), {undo}, or start over with --fresh"
    )


def _all_but(config: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in vars(config) if name not in names)


def environment(state: Any) -> dict[str, Any]:
    """Returns the versions, devices, mesh and flags that a state depends on, for JSON.

    Args:
      state: a tree of arrays or shapes; the mesh is taken from their shardings.
    """
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version(), **_package_versions()},
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "mesh": _mesh_shape(state),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        # What XLA compiles for a CPU depends on it, and on it depends model.dtype auto.
        "cpu": _cpu_name() if devices[0].platform == "cpu" else "",
        **_numerics(),
    }


def shared_environment() -> dict[str, str]:
    """Returns what the processes of one run must have alike: versions and flags."""
    return {**_package_versions(), **_numerics()}


def _numerics() -> dict[str, str]:
    flags = {name: str(getattr(jax.config, name)) for name in _JAX_FLAGS}
    return {"auto_dtype": compute_dtype("auto").name, **flags}


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@functools.cache  # each lookup in site-packages takes a millisecond
def _package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _mesh_shape(state: Any) -> dict[str, int] | None:
    """Returns the sizes of mesh axes longer than 1; None if no array has a mesh."""
    for leaf in jax.tree.leaves(state):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return {k: v for k, v in sharding.mesh.shape.items() if v > 1}
    return None


def environment_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Compares two results of `environment`: lines `what: old -> new`."""
    flat_old = {**old, **old.get("versions", {})}
    flat_new = {**new, **new["versions"]}
    # On one device there is no difference between a mesh and none.
    flat_old["mesh"], flat_new["mesh"] = old.get("mesh") or {}, new["mesh"] or {}
    for name in ("cpu", "auto_dtype", *_JAX_FLAGS):  # Earlier versions wrote none.
        flat_old.setdefault(name, flat_new[name])
    return [
        f"{name}: {flat_old.get(name)} -> {value}"
        for name, value in flat_new.items()
        if name != "versions" and flat_old.get(name) != value
    ]
