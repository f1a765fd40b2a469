"""Measures block sizes on the current device, for `jaxlm tune attention`."""

import dataclasses
import importlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.fields import nearest
from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS
from jaxlm.ops.attention.request import AttentionRequest, request
from jaxlm.ops.attention.spec import AttentionSpec, Mask
from jaxlm.ops.attention.tuning.tuning_cache import record, settings_key

BLOCKS = (128, 256, 512, 1024)


@dataclass(frozen=True)
class Group:
    """Settings of an implementation that are tuned together."""

    fields: tuple[str, ...]
    values: tuple[int, ...]
    """The candidates for each field."""
    workload: str = "forward"
    """What is timed: forward, backward (which includes forward), or decode."""


def _flash_groups(
    blocks: tuple[int, ...], decode: tuple[int, ...]
) -> tuple[Group, ...]:
    backward = ("backward_block_queries", "backward_block_keys")
    return (
        Group(("block_queries", "block_keys"), blocks),
        Group(backward, blocks, "backward"),
        Group(("decode_block_keys",), decode, "decode"),
    )


# Implementation -> (module with `settings_for`, groups in tuning order).
TUNABLE: dict[str, tuple[str, tuple[Group, ...]]] = {
    "dense": (
        "jaxlm.ops.attention.dense",
        (Group(("block",), (64, *BLOCKS), "backward"),),
    ),
    "xla": ("jaxlm.ops.attention.blocked", (Group(("block",), BLOCKS, "backward"),)),
    "pallas_tpu": (
        "jaxlm.ops.attention.tpu.pallas_tpu",
        _flash_groups(BLOCKS, (512, 1024, 2048)),
    ),
    "pallas_gpu": (
        "jaxlm.ops.attention.gpu.pallas_gpu",
        _flash_groups((64, 128), (64, 128, 256)),
    ),
}


def tune(
    implementation: str | None,
    *,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any,
    window: int | None = None,
) -> Iterator[str]:
    """Times all candidates and records the fastest; yields lines to print.

    Args:
      implementation: a name in `TUNABLE`; None: all that can run these sizes here.

    Raises:
      ValueError: for sizes that are not positive or do not divide, and for an
        implementation that is not tunable, declines, or compiles no candidate.
    """
    sizes = {"batch": batch, "length": length, "heads": heads, "kv_heads": kv_heads}
    for name, size in {**sizes, "head_dim": head_dim}.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    if heads % kv_heads:
        raise ValueError(f"kv_heads {kv_heads} does not divide heads {heads}")
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads))
    q, k, v = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    spec = AttentionSpec(head_dim**-0.5, Mask(window=window))
    for name in _names(implementation, request(q, k, spec)):
        yield from _tune_one(name, q, k, v, spec)


def _names(implementation: str | None, call: AttentionRequest) -> list[str]:
    reasons = {name: IMPLEMENTATIONS[name].declines(call) for name in TUNABLE}
    if implementation is None:
        return [name for name, reason in reasons.items() if reason is None]
    if implementation not in TUNABLE:
        raise ValueError(
            f"no block sizes to tune in {implementation!r}"
            f"{nearest(implementation, list(TUNABLE))}: choose one of "
            f"{', '.join(TUNABLE)}"
        )
    if reasons[implementation] is not None:
        raise ValueError(f"attention {implementation!r}: {reasons[implementation]}")
    return [implementation]


def _tune_one(name: str, q, k, v, spec: AttentionSpec) -> Iterator[str]:
    module, groups = TUNABLE[name]
    best = importlib.import_module(module).settings_for(q)
    key = settings_key(name, q)
    for group in groups:
        candidates = list(itertools.product(group.values, repeat=len(group.fields)))
        times = {}
        for count, values in enumerate(candidates, 1):
            fields = dict(zip(group.fields, values, strict=True))
            settings = dataclasses.replace(best, **fields)
            label = ", ".join(map("{} {}".format, group.fields, values))
            label = f"{name} {group.workload} [{count}/{len(candidates)}] {label}"
            try:
                times[settings] = _seconds(
                    name, group.workload, q, k, v, spec, settings
                )
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                # Usually too large for on-chip memory. TPU compilation raises
                # JaxRuntimeError, GPU compilation ValueError.
                yield f"{label}: does not compile: {str(error).splitlines()[0][:80]}"
                continue
            yield f"{label}: {times[settings] * 1e3:.3f} ms"
        if not times:
            raise ValueError(
                f"attention {name!r}: no candidate compiles on this device"
            )
        best = min(times, key=times.__getitem__)
        chosen = ", ".join(f"{f} {getattr(best, f)}" for f in group.fields)
        file = record(key, best, group.fields)
        yield f"{key}: {chosen} is the fastest -> {file}"


def _seconds(name, workload, q, k, v, spec: AttentionSpec, settings: Any) -> float:
    """Times calls for half a second; returns the seconds of the fastest."""
    run = partial(IMPLEMENTATIONS[name].run, settings=settings)
    if workload == "decode":
        B, S = k.shape[:2]
        q = q[:, :1]
        mask = dataclasses.replace(spec.mask, query_positions=jnp.full((B, 1), S - 1))
        spec = dataclasses.replace(spec, mask=mask)

    def total(q, k, v):
        return jnp.sum(run(q, k, v, spec)[0].astype(jnp.float32))

    timed = jax.jit(jax.grad(total, (0, 1, 2)) if workload == "backward" else total)
    jax.block_until_ready(timed(q, k, v))
    best, started = math.inf, time.perf_counter()
    while time.perf_counter() - started < 0.5:
        before = time.perf_counter()
        jax.block_until_ready(timed(q, k, v))
        best = min(best, time.perf_counter() - before)
    return best
