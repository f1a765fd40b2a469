"""Flash attention and its gradient for Hopper GPUs, in Pallas Mosaic GPU.

After FlashAttention-2 (Dao 2023, arXiv:2307.08691), with the asynchronous copies and
matrix instructions of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). Each
program is one warpgroup and owns one block (`streaming.py`). dq has its own kernel, so
that no two programs add to the same element and results are deterministic.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.block_skipping import Grid
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.gpu.streaming import Program, Side, StreamingKernel
from jaxlm.ops.attention.gpu.warpgroup import spread
from jaxlm.ops.attention.spec import MASKED, AttentionSpec


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    settings: GpuSettings,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Computes z in q's dtype and the log-sum-exp, f32; see `FlashKernels`."""
    B, T, N, H = q.shape
    grid = Grid(T, k.shape[1], settings.block_queries, settings.block_keys)
    kernel = StreamingKernel(
        spec,
        grid,
        group=N // k.shape[2],
        resident=Side("query", grid.block_queries, ("q",)),
        streamed=Side("key", grid.block_keys, ("k", "v"), buffers=settings.buffers),
        interpret=settings.interpret,
    )
    floats = {}
    if spec.sinks is not None:
        floats["sinks"] = spec.sinks.astype(jnp.float32)
    outputs = {
        "z": jax.ShapeDtypeStruct((B, kernel.rows, N, H), q.dtype),
        "lse": jax.ShapeDtypeStruct((B, N, kernel.rows), jnp.float32),
    }
    matrices = {"q": q, "k": k, "v": v}
    out = kernel.launch(_forward_program, matrices, floats, outputs)
    return out["z"][:, :T], out["lse"][:, :, :T]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    dz: Float[Array, "B T N H"],
    settings: GpuSettings,
) -> tuple[Array, Array, Array]:
    """Computes dq, dk and dv in the dtypes of q, k and v; see `FlashKernels`."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grid = Grid(T, S, settings.backward_block_queries, settings.backward_block_keys)
    buffers = settings.backward_buffers
    queries = Side("query", grid.block_queries, ("q", "dz"), ("lse", "delta"))
    keys = Side("key", grid.block_keys, ("k", "v"))
    kernel = StreamingKernel(
        spec,
        grid,
        group=N // K,
        resident=queries,
        streamed=replace(keys, buffers=buffers),
        interpret=settings.interpret,
    )
    beyond = [(0, 0), (0, 0), (0, kernel.rows - T)]
    matrices = {"q": q, "k": k, "v": v, "dz": dz}
    floats = {
        # A huge log-sum-exp makes the probabilities of padding queries 0.
        "lse": jnp.pad(lse, beyond, constant_values=-MASKED) * online_softmax.LOG2_E,
        "delta": jnp.pad(delta, beyond),
    }
    outputs = {"dq": jax.ShapeDtypeStruct((B, kernel.rows, N, H), q.dtype)}
    dq = kernel.launch(_query_program, matrices, floats, outputs)["dq"]

    kernel = replace(kernel, resident=keys, streamed=replace(queries, buffers=buffers))
    like_k = jax.ShapeDtypeStruct((B, kernel.rows, K, H), k.dtype)
    # With wide heads, two accumulators do not fit in the registers of a warpgroup.
    launches = [("dk",), ("dv",)] if H > 128 else [("dk", "dv")]
    dkv = {}
    for names in launches:
        outputs = dict.fromkeys(names, like_k)
        dkv |= kernel.launch(_key_program, matrices, floats, outputs)
    return dq[:, :T], dkv["dk"][:, :S], dkv["dv"][:, :S]


def _forward_program(run: Program) -> None:
    """Computes z and the log-sum-exp of one block of queries of one head."""

    def attend(j, slot, all_visible, carry):
        m, l, acc = carry
        raw = run.warpgroup.dot(run.tile("q", None), run.tile("k", slot))
        s = run.scores(raw, all_visible, j, slot, 0)
        m_new = jnp.maximum(m, jnp.max(s, axis=1))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - spread(m_new, s.shape, 0))
        l = l * alpha + jnp.sum(p, axis=1)
        acc = acc * spread(alpha, acc.shape, 0)
        return m_new, l, run.warpgroup.accumulate(acc, p, run.tile("v", slot))

    start = run.warpgroup.softmax_start(*run.tile("q", None).shape)
    m, l, acc = run.stream(attend, start)
    sink = run.ins["sinks"][run.head] if "sinks" in run.ins else None
    factor, lse = online_softmax.finish(m / online_softmax.LOG2_E, l, sink)
    run.store({"z": acc * spread(factor, acc.shape, 0)}, lse)


def _query_program(run: Program) -> None:
    """Computes dq of one block of queries of one head."""

    def add(j, slot, all_visible, dq):
        q, dz = run.tile("q", None), run.tile("dz", None)
        k, v = run.tile("k", slot), run.tile("v", slot)
        raw, dp = run.warpgroup.dots([(q, k), (dz, v)])
        p = run.probs(raw, all_visible, j, slot, 0)
        ds = run.dscores(raw, p, dp, slot, 0)
        return run.warpgroup.accumulate(dq, ds, k)

    dq = run.stream(add, run.zeros("dq"))
    run.store({"dq": dq * run.kernel.spec.scale})


def _key_program(run: Program) -> None:
    """Computes dk, dv or both of one block of keys of one key head.

    Sums over the queries, and over the query heads that share the key head. Scores are
    [keys, queries].
    """

    def add(i, slot, all_visible, sums):
        q, dz = run.tile("q", slot), run.tile("dz", slot)
        pairs = [(run.tile("k", None), q)]
        if "dk" in sums:
            pairs.append((run.tile("v", None), dz))
        products = run.warpgroup.dots(pairs)
        raw = products[0]
        p = run.probs(raw, all_visible, i, slot, 1)
        added = {}
        if "dv" in sums:
            added["dv"] = (sums["dv"], p, dz)
        if "dk" in sums:
            ds = run.dscores(raw, p, products[1], slot, 1)
            added["dk"] = (sums["dk"], ds, q)
        results = run.warpgroup.accumulate_all(list(added.values()))
        return dict(zip(added, results, strict=True))

    sums = run.stream(add, {name: run.zeros(name) for name in run.out})
    if "dk" in sums:
        sums["dk"] *= run.kernel.spec.scale
    run.store(sums)
