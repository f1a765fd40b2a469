"""`attention`, and the choice of the implementation that computes it.

Each implementation takes an `AttentionRequest` and returns a reason to decline it, or
None. An implementation requested by name runs, or raises with its reason; `auto` takes
the first in the device's list that does not decline. The choice is logged once: at INFO
what was chosen and why the others declined, and at WARNING when an accelerator runs
long sequences without a kernel.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Num

from jaxlm.fields import nearest
from jaxlm.ops.attention import blocked, cached, dense
from jaxlm.ops.attention.context_parallel import Cut, gathered_attention, ring_kernels
from jaxlm.ops.attention.flash import FlashKernels, flash_attention
from jaxlm.ops.attention.reference import reference_attention
from jaxlm.ops.attention.request import AttentionRequest, part_of_row, request
from jaxlm.ops.attention.spec import AttentionSpec, Mask, dequantize
from jaxlm.ops.collectives import axes_of
from jaxlm.ops.layout import layout

logger = logging.getLogger(__name__)

Across = Literal["ring", "gather"]
Result = tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]


@dataclass(frozen=True)
class Implementation:
    """Attention in plain JAX operations, which XLA can shard over a mesh."""

    run: Callable[..., Result]
    """(q, k, v, spec, *, settings=None)"""
    declines: Callable[[AttentionRequest], str | None] = lambda request: None
    """Returns the reason why it cannot run a request; None: it can."""
    int8: bool = False
    """Whether it takes int8 keys and values; if not, they are dequantized first."""
    kernels: Callable[[Array, AttentionSpec], FlashKernels] | None = None
    """(q, spec) -> the kernels that it consists of, which a ring can call."""


@dataclass(frozen=True)
class Kernel:
    """A module with `attention` and `declines`, imported on first use.

    XLA cannot shard a kernel; in a mesh each device runs it on its own batch rows and
    heads.
    """

    module: str
    platform: str
    """gpu or tpu."""
    int8: bool = False
    is_flash: bool = False
    """Whether the module has `kernels`."""

    @property
    def kernels(self) -> Callable[[Array, AttentionSpec], FlashKernels] | None:
        """See `Implementation.kernels`."""
        return self._kernels if self.is_flash else None

    def _kernels(self, q: Array, spec: AttentionSpec) -> FlashKernels:
        return importlib.import_module(self.module).kernels(q, spec)

    def run(
        self, q: Array, k: Array, v: Array, spec: AttentionSpec, **settings: Any
    ) -> Result:
        module = importlib.import_module(self.module)
        return module.attention(q, k, v, spec, **settings)

    def declines(self, request: AttentionRequest) -> str | None:
        if request.platform != self.platform:
            return f"needs a {self.platform.upper()}"
        if request.auto_mesh:
            return "XLA cannot shard a kernel over Auto mesh axes: make them Explicit"
        return importlib.import_module(self.module).declines(request)


IMPLEMENTATIONS: dict[str, Implementation | Kernel] = {
    "reference": Implementation(reference_attention, int8=True),
    "dense": Implementation(dense.dense_attention, dense.declines),
    "xla": Implementation(blocked.blocked_attention, kernels=blocked.kernels),
    "cached": Implementation(cached.cached_attention, cached.declines, int8=True),
    "pallas_tpu": Kernel("jaxlm.ops.attention.tpu.pallas_tpu", "tpu", True, True),
    "pallas_gpu": Kernel("jaxlm.ops.attention.gpu.pallas_gpu", "gpu", True, True),
    "splash": Kernel("jaxlm.ops.attention.jax_kernels.splash", "tpu"),
    "cudnn": Kernel("jaxlm.ops.attention.jax_kernels.cudnn", "gpu"),
}

# What `auto` tries on each platform, in this order.
AUTO = {
    "tpu": ("pallas_tpu", "splash", "xla", "reference"),
    "gpu": ("pallas_gpu", "cudnn", "xla", "reference"),
    "cpu": ("cached", "dense", "xla", "reference"),
}

# The kinds of device on which each of our kernels is proven: a run recorded in
# benchmarks/results shows that it is correct, the same in every run, and the fastest of
# those in `AUTO` that are. (cuDNN's gradients differ from run to run.)
PROVEN: dict[str, frozenset[str]] = {
    "pallas_tpu": frozenset(),
    "pallas_gpu": frozenset({"NVIDIA H100 80GB HBM3"}),
}

# All in scores per head, T * S. `auto` takes `xla` from this size on. Measured on CPUs,
# where `dense` comes first (benchmarks/results/attention_cpu.json); elsewhere so that
# longer rows never keep [T, S] for their gradient.
XLA_MIN_SCORES = 256 * 256
# From here on `dense` is no faster than `xla`, and uses more memory.
DENSE_MAX_SCORES = 2048 * 2048
# From here on an accelerator should run a kernel.
KERNEL_MIN_SCORES = 512 * 512


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and why the others do not."""

    name: str
    declined: tuple[tuple[str, str], ...] = ()
    """Names and reasons; empty if the implementation was requested by name."""
    warning: str | None = None
    """What is slower than expected on this accelerator, and what to do about it."""
    across: Across | None = None
    """How it sees the keys on other devices, where rows are cut over several."""

    def __str__(self) -> str:
        how = self.name if self.across is None else f"{self.name} by {self.across}"
        return "; ".join((f"auto took {how}", *_by_reason(self.declined)))

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, for `metrics.jsonl`."""
        return {"took": self.name, "declined": dict(self.declined)}


def _by_reason(declined: tuple[tuple[str, str], ...]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in declined:
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(group)}: {reason}" for reason, group in names.items()]


def choose(
    implementation: str,
    request: AttentionRequest,
    devices: int = 1,
    across: Across | Literal["auto"] = "auto",
) -> Choice:
    """Chooses the implementation that runs. Pure: logs nothing and keeps no state.

    Args:
      devices: over which each row is cut.
      across: how the keys on other devices are seen; `auto` is a ring, if what would
        run without one can be part of it.

    Raises:
      ValueError: for an unknown name, or an implementation that declines the request.
    """
    if devices == 1:
        return _choose_named(implementation, request)
    part = part_of_row(request, devices, ring=across == "ring")
    choice = _choose_named(implementation, part)
    if across == "auto":
        across = "ring" if IMPLEMENTATIONS[choice.name].kernels else "gather"
    return replace(choice, across=across)


def _choose_named(implementation: str, request: AttentionRequest) -> Choice:
    if implementation == "auto":
        return _choose(request)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no attention implementation {implementation!r}"
            f"{nearest(implementation, list(IMPLEMENTATIONS))}: choose auto or one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    reason = _declines(implementation, request)
    if reason is not None:
        able = [n for n in IMPLEMENTATIONS if _declines(n, request) is None]
        raise ValueError(
            f"attention {implementation!r}: {reason}; for this call choose auto or one "
            f"of {', '.join(able)}"
        )
    return Choice(implementation)


def _declines(name: str, request: AttentionRequest) -> str | None:
    """Returns why an implementation cannot run a request; None: it can."""
    if request.ring and IMPLEMENTATIONS[name].kernels is None:
        return "no ring, since it has no kernels for parts of the keys"
    return IMPLEMENTATIONS[name].declines(request)


def _choose(request: AttentionRequest) -> Choice:
    order = AUTO[request.platform]
    others = [name for name in IMPLEMENTATIONS if name not in order]
    declined = [(n, _declines(n, request)) for n in others]
    for name in order:
        reason = _declines(name, request) or _not_chosen(name, request)
        if reason is None:
            reasons = tuple((n, why) for n, why in declined if why is not None)
            return Choice(name, reasons, _slow(name, reasons, request))
        declined.append((name, reason))
    raise AssertionError(f"nothing computes {request}")


def _not_chosen(name: str, request: AttentionRequest) -> str | None:
    """Returns why `auto` skips an implementation that could run the request."""
    if name in PROVEN and request.device_kind not in PROVEN[name]:
        return f"not proven on {request.device_kind} yet, name it to run it"
    scores = request.num_queries * request.num_keys
    one = request.num_queries == 1
    if name == "dense" and (one or scores >= DENSE_MAX_SCORES):
        return "only chosen for several queries and sequences that are not too long"
    short = one or scores < XLA_MIN_SCORES
    if name == "xla" and short and not request.ring:
        return "only chosen for several queries and long sequences"
    return None


def _slow(
    name: str, declined: tuple[tuple[str, str], ...], request: AttentionRequest
) -> str | None:
    """Returns a warning if an accelerator runs long sequences without a kernel."""
    if request.platform == "cpu" or isinstance(IMPLEMENTATIONS[name], Kernel):
        return None
    if request.num_queries * request.num_keys < KERNEL_MIN_SCORES:
        return None
    kernels = {
        name
        for name, kernel in IMPLEMENTATIONS.items()
        if isinstance(kernel, Kernel) and kernel.platform == request.platform
    }
    reasons = tuple((n, why) for n, why in declined if n in kernels)
    return (
        f"long sequences run in {name}, which is slower than a kernel "
        f"({'; '.join(_by_reason(reasons))}): change what a kernel declines, or name "
        "one that is not proven yet (--model.attention)"
    )


@functools.cache
def _log_once(level: int, line: str) -> None:
    """Logs a line once per process, since every layer makes the same choice."""
    logger.log(level, "%s", line)


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec | None = None,
    *,
    implementation: str = "auto",
    across: Across | Literal["auto"] = "auto",
    zigzag: bool = False,
    return_lse: bool = False,
) -> Result:
    """Computes grouped-query attention, in q's dtype; N is a multiple of K.

    In an Explicit mesh the batch, the heads, and the tokens of whole rows may be
    sharded.

    Args:
      spec: None is causal attention, with scores scaled by H ** -0.5.
      implementation: a name in `IMPLEMENTATIONS`, or "auto".
      across: how devices see each other's keys where the tokens are sharded; see
        `choose`.
      zigzag: where the tokens are sharded, they are in zigzag order
        (`context_parallel.py`); otherwise it changes nothing.
      return_lse: also return the log-sum-exp of the scores, sinks included, f32, else
        None. It has a gradient too. Use it to recompute the probabilities, or to merge
        attention over parts of the keys.

    Raises:
      ValueError: for shapes that do not fit, queries that are integers, a window or a
        soft cap that is not positive, an unknown implementation, one that declines the
        call, or queries that are sharded in another way.
    """
    _check_shapes(q.shape, k.shape, v.shape)
    if spec is None:
        spec = AttentionSpec(q.shape[-1] ** -0.5)
    _check_options(q, spec)
    call, cut = request(q, k, spec, lse=return_lse), _cut(q, k, spec, zigzag)
    choice = choose(implementation, call, cut.devices if cut else 1, across)
    if implementation == "auto":
        _log_once(logging.INFO, f"attention on {call.device_kind}: {choice}")
    if choice.warning is not None:
        warning = f"attention on {call.device_kind}: {choice.warning}"
        _log_once(logging.WARNING, warning)
    chosen = IMPLEMENTATIONS[choice.name]
    if not chosen.int8:
        k, v, spec = dequantize(k, v, spec, q.dtype)
    run = chosen.run
    if choice.across == "gather":
        assert cut is not None
        run = partial(gathered_attention, run, cut)
    elif choice.across == "ring":
        assert cut is not None
        run = partial(_ring, chosen.kernels, cut)
    if cut is not None or isinstance(chosen, Kernel):
        z, lse = _on_each_device(run, q, k, v, spec, return_lse)
    else:
        z, lse = run(q, k, v, spec)
    return z, lse if return_lse else None


def _ring(kernels, cut: Cut, q, k, v, spec: AttentionSpec) -> Result:
    return flash_attention(ring_kernels(kernels(q, spec), cut), q, k, v, spec)


def _cut(q: Array, k: Array, spec: AttentionSpec, zigzag: bool) -> Cut | None:
    """Returns how tokens lie on devices; None if each device has whole rows.

    Raises:
      ValueError: if tokens that are no whole rows are sharded.
    """
    sharding = layout(q)
    if sharding is None:
        return None
    shape = sharding.mesh.shape
    axes = [axis for axis in axes_of(sharding.spec[1]) if shape[axis] > 1]
    if not axes:
        return None
    positions = spec.mask.query_positions
    if len(axes) > 1 or q.shape[1] != k.shape[1] or positions is not None:
        raise ValueError(
            f"attention: queries are sharded as {sharding.spec}, but their tokens may "
            "be sharded only over one axis, and as whole rows that are keys too"
        )
    return Cut(axes[0], shape[axes[0]], zigzag)


def _check_shapes(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> None:
    if len(q) != 4 or len(k) != 4 or k != v:
        raise ValueError(
            f"attention: q, k and v have shapes {q}, {k} and {v}: they must be "
            "[B, T, N, H], and [B, S, K, H] for both k and v"
        )
    if (q[0], q[3]) != (k[0], k[3]):
        raise ValueError(
            f"attention: q {q} and k {k} must have the same batch and head dimension"
        )
    if q[2] % k[2]:
        raise ValueError(
            f"attention: {q[2]} query heads (axis 2 of q) are not a multiple of "
            f"{k[2]} key/value heads (axis 2 of k)"
        )


def _check_options(q: Array, spec: AttentionSpec) -> None:
    """Raises ValueError for what would give numbers that mean nothing."""
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention: q is of {q.dtype}: give floating-point numbers")
    window, cap = spec.mask.window, spec.soft_cap
    if window is not None and window < 1:
        raise ValueError(
            f"attention: the window is {window}: it counts the query itself, so it is "
            "at least 1; None: no window"
        )
    if cap is not None and not cap > 0:
        raise ValueError(
            f"attention: the soft cap is {cap}: it must be above 0; None: no cap"
        )


def _on_each_device(run, q, k, v, spec: AttentionSpec, return_lse: bool) -> Result:
    """Calls `run` on each device of an Explicit mesh, on its batch rows and heads."""
    sharding = layout(q)
    if sharding is None:
        return run(q, k, v, spec)
    batch, tokens, heads, head_dim = sharding.spec
    if head_dim is not None:
        raise ValueError(
            f"attention: queries are sharded as {sharding.spec}, but heads must be "
            "whole"
        )

    def rows(x: Array | None, *axes: Any) -> P | None:
        """The partitions of x; a single row for the whole batch is replicated."""
        if x is None:
            return None
        return P(None if x.shape[0] == 1 else batch, *axes)

    mask = spec.mask
    spec_partitions = AttentionSpec(
        spec.scale,
        Mask(
            mask.causal,
            mask.window,
            query_positions=rows(mask.query_positions, None),
            query_segments=rows(mask.query_segments, tokens),
            key_segments=rows(mask.key_segments, tokens),
        ),
        spec.soft_cap,
        sinks=None if spec.sinks is None else P(heads),
        key_scale=rows(spec.key_scale, None, heads),
        value_scale=rows(spec.value_scale, None, heads),
    )
    sharded = P(batch, tokens, heads, None)
    in_specs = (sharded, sharded, sharded, spec_partitions)
    arguments = jax.tree.map(jax.sharding.reshard, (q, k, v, spec), in_specs)
    out_specs = (sharded, P(batch, heads, tokens) if return_lse else None)

    def local(*arguments):
        z, lse = run(*arguments)
        return z, lse if return_lse else None

    sharded_run = jax.shard_map(
        local, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return sharded_run(*arguments)
