"""The choice between implementations of attention.

An implementation looks at the `Request` and gives a reason to decline it, or none.
Named, it runs or raises with that reason; `auto` takes the first of the device's list
that does not decline, and says once which it took and why others declined.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Num

from jaxlm.config import nearest
from jaxlm.ops.attention import blocked, dense
from jaxlm.ops.attention.request import Request, request
from jaxlm.ops.attention.spec import AttentionSpec, dequantize, reference_attention
from jaxlm.ops.layout import layout

Result = tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention, in operations that XLA cuts over a mesh itself."""

    run: Callable[..., Result]
    """(q, k, v, spec, *, settings=None)"""
    declines: Callable[[Request], str | None] = lambda asked: None
    """Why it cannot do what is asked; None: it can."""
    int8: bool = False
    """Takes int8 keys and values as they are; else they are dequantized before."""


@dataclass(frozen=True)
class Kernel:
    """A module with `attention` and `declines`, imported where it is used: opaque to
    XLA, so that in a mesh each device runs it on its own rows and heads."""

    module: str
    platform: str
    int8: bool = False

    def run(
        self, q: Array, k: Array, v: Array, spec: AttentionSpec, **settings: Any
    ) -> Result:
        module = importlib.import_module(self.module)
        return module.attention(q, k, v, spec, **settings)

    def declines(self, asked: Request) -> str | None:
        if asked.platform != self.platform:
            return f"needs a {self.platform.upper()}"
        if asked.auto_mesh:
            return "XLA cannot cut a kernel over Auto mesh axes: make them Explicit"
        return importlib.import_module(self.module).declines(asked)


IMPLEMENTATIONS: dict[str, Implementation | Kernel] = {
    "reference": Implementation(reference_attention, int8=True),
    "dense": Implementation(dense.dense_attention, dense.declines),
    "xla": Implementation(blocked.blocked_attention),
    "pallas_tpu": Kernel("jaxlm.ops.attention.tpu.pallas_tpu", "tpu", int8=True),
    "pallas_gpu": Kernel("jaxlm.ops.attention.gpu.pallas_gpu", "gpu", int8=True),
    "pallas_hopper": Kernel("jaxlm.ops.attention.gpu.hopper", "gpu", int8=True),
    "splash": Kernel("jaxlm.ops.attention.jax_kernels.splash", "tpu"),
    "mosaic_gpu": Kernel("jaxlm.ops.attention.jax_kernels.mosaic_gpu", "gpu"),
    "cudnn": Kernel("jaxlm.ops.attention.jax_kernels.cudnn", "gpu"),
}

# What `auto` tries, in this order. On each device the fast ones first.
AUTO = {
    "tpu": ("pallas_tpu", "splash", "xla", "reference"),
    "gpu": ("pallas_hopper", "pallas_gpu", "cudnn", "xla", "reference"),
    "cpu": ("dense", "xla", "reference"),
}

# Our own kernels, each with the kinds of device on which a run of it is recorded in
# benchmarks/results: right, and faster than what stands behind it in `AUTO`.
PROVEN: dict[str, frozenset[str]] = {
    "pallas_tpu": frozenset(),
    "pallas_gpu": frozenset(),
    "pallas_hopper": frozenset(),
}

# Scores of each head from which `auto` takes `xla`. Measured on CPUs, where `dense`
# comes before it (benchmarks/results/attention_cpu.json); elsewhere a guess.
LONG = {"cpu": 256 * 256, "gpu": 1024 * 1024, "tpu": 1024 * 1024}
# Scores of each head from which `dense` is no faster than `xla`, and holds more.
TOO_LONG_FOR_DENSE = 2048 * 2048


@dataclass(frozen=True)
class Choice:
    """What runs, and what was asked before it."""

    name: str
    declined: tuple[tuple[str, str], ...]
    """Names and reasons."""

    def __str__(self) -> str:
        names: dict[str, list[str]] = {}
        for name, reason in self.declined:
            names.setdefault(reason, []).append(name)
        parts = [f"auto took {self.name}"]
        parts += [f"{', '.join(who)}: {reason}" for reason, who in names.items()]
        return "; ".join(parts)


def choose(implementation: str, asked: Request) -> Choice:
    """The implementation that runs.

    Raises:
      ValueError: for an unknown name, and for one that cannot do what is asked.
    """
    if implementation == "auto":
        return _choose(asked)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no attention implementation {implementation!r}"
            f"{nearest(implementation, list(IMPLEMENTATIONS))}: choose auto or one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    reason = IMPLEMENTATIONS[implementation].declines(asked)
    if reason is not None:
        able = [n for n, i in IMPLEMENTATIONS.items() if i.declines(asked) is None]
        raise ValueError(
            f"attention {implementation!r}: {reason}; for this call choose auto or one "
            f"of {', '.join(able)}"
        )
    return Choice(implementation, ())


def _choose(asked: Request) -> Choice:
    order = AUTO[asked.platform]
    others = [name for name in IMPLEMENTATIONS if name not in order]
    declined = [(n, IMPLEMENTATIONS[n].declines(asked)) for n in others]
    for name in order:
        reason = IMPLEMENTATIONS[name].declines(asked) or _not_chosen(name, asked)
        if reason is None:
            reasons = tuple((n, why) for n, why in declined if why is not None)
            return Choice(name, reasons)
        declined.append((name, reason))
    raise AssertionError(f"nothing computes {asked}")


def _not_chosen(name: str, asked: Request) -> str | None:
    """Why `auto` passes over an implementation that could do what is asked."""
    if name in PROVEN and asked.device_kind not in PROVEN[name]:
        return f"not proven on a {asked.device_kind} yet, name it to run it"
    scores = asked.num_queries * asked.num_keys
    one = asked.num_queries == 1
    if name == "dense" and (one or scores >= TOO_LONG_FOR_DENSE):
        return "for several queries and rows that are not too long"
    if name == "xla" and (one or scores < LONG[asked.platform]):
        return "for several queries and long rows"
    return None


@functools.cache
def _say(line: str) -> None:
    """On stderr, once in a process."""
    print(line, file=sys.stderr, flush=True)


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | Result:
    """Grouped-query attention in q's dtype; N is a multiple of K.

    In an Explicit mesh the batch and the heads may be cut, and nothing else.

    Args:
      implementation: a name in `IMPLEMENTATIONS`, or auto.
      return_lse: return the log-sum-exp of the scores too ([B N T], f32, the sink
        included), which has a gradient as well: what rebuilds probabilities, and what
        merges attention over parts of the keys.

    Raises:
      ValueError: for an unknown implementation, or one that cannot do what is asked.
    """
    asked = request(q, k, spec, lse=return_lse)
    choice = choose(implementation, asked)
    if implementation == "auto":
        _say(f"attention on {asked.device_kind}: {choice}")
    chosen = IMPLEMENTATIONS[choice.name]
    if not chosen.int8:
        k, v, spec = dequantize(k, v, spec, q.dtype)
    if isinstance(chosen, Kernel):
        z, lse = _on_each_device(chosen.run, q, k, v, spec, return_lse)
    else:
        z, lse = chosen.run(q, k, v, spec)
    return (z, lse) if return_lse else z


def _on_each_device(run, q, k, v, spec: AttentionSpec, return_lse: bool) -> Result:
    """`run` on the rows and heads that each device of an Explicit mesh has."""
    placed = layout(q)
    if placed is None:
        return run(q, k, v, spec)
    batch, tokens, heads, width = placed.spec
    if tokens is not None or width is not None:
        raise ValueError(
            f"attention: queries are laid out as {placed.spec}, but only the batch and "
            "the heads may be cut"
        )

    def partition(x: Array, *axes: Any) -> P:
        """That of x, a row for all of the batch being whole on each device."""
        whole = axes[0] is batch and x.shape[0] == 1
        return P(None, *axes[1:]) if whole else P(*axes)

    cuts = {
        "sinks": (heads,),
        "query_segments": (batch, None),
        "key_segments": (batch, None),
        "query_index": (batch, None),
        "key_length": (batch,),
        "key_scale": (batch, None, heads),
        "value_scale": (batch, None, heads),
    }
    given = {name: getattr(spec, name) for name in cuts}
    parts = {n: partition(x, *cuts[n]) for n, x in given.items() if x is not None}
    cut = P(batch, None, heads, None)
    in_specs = (cut, cut, cut, replace(spec, **parts))
    arguments = jax.tree.map(jax.sharding.reshard, (q, k, v, spec), in_specs)
    out_specs = (cut, P(batch, heads, None)) if return_lse else cut

    def local(*arguments):
        z, lse = run(*arguments)
        return (z, lse) if return_lse else z

    out = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        *arguments
    )
    return out if return_lse else (out, None)
