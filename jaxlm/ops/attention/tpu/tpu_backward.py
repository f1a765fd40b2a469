"""The backward kernels of flash attention on TPUs, in Pallas (Mosaic).

FlashAttention-2 (Dao 2023, arXiv:2307.08691): one kernel for the gradient of the
queries, and one for those of keys and values. Each sums in a fixed order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.block_skipping import BlockTable, bounds
from jaxlm.ops.attention.spec import MASKED, AttentionSpec
from jaxlm.ops.attention.tpu.tpu_blocks import (
    LANES,
    TpuSettings,
    allowed,
    cut_blocks,
    dot,
    fill_after,
    heads_first,
    input_specs,
    key_block,
    query_block,
    run_kernel,
    visit_pair,
)


def backward(q, k, v, spec: AttentionSpec, lse, delta, dz, settings: TpuSettings):
    """Computes dq, dk and dv; see `flash.FlashKernels`."""
    T, S = q.shape[1], k.shape[1]
    blocks = settings.backward_block_queries, settings.backward_block_keys
    table = cut_blocks(spec, T, S, blocks)
    arrays = {"q": q, "k": k, "v": v, "dz": dz}
    inputs = {name: heads_first(x) for name, x in arrays.items()}
    lse_base_2 = lse * online_softmax.LOG2_E
    inputs |= {"lse": lse_base_2[:, :, None], "delta": delta[:, :, None]}
    dq = _query_gradient(spec, table, inputs, settings)
    dk, dv = _key_value_gradients(spec, table, inputs, settings)
    return tuple(heads_first(x) for x in (dq, dk, dv))


def _query_gradient(
    spec: AttentionSpec, table: BlockTable, inputs, settings: TpuSettings
):
    B, N, T, H = inputs["q"].shape
    group = N // inputs["k"].shape[1]

    def queries(b, n, i, j, table):
        return b, n, i

    def keys(b, n, i, j, table):
        return b, n // group, key_block(table, b, i, j)

    grid = table.grid
    inputs, in_specs = input_specs(spec.mask, grid, inputs, queries, keys)
    limits = bounds(spec.mask, grid)
    return run_kernel(
        partial(_query_gradient_kernel, spec),
        table,
        inputs,
        in_specs,
        grid=(B, N, grid.query_blocks, limits.keys),
        out_specs=pl.BlockSpec(
            (1, 1, grid.block_queries, H), lambda b, n, i, *_: (b, n, i, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((B, N, T, H), inputs["q"].dtype),
        scratch=[(grid.block_queries, width) for width in (H, LANES, LANES)],
        matmuls=3 * limits.pairs,
        settings=settings,
    )


def _query_gradient_kernel(
    spec: AttentionSpec, table: BlockTable, refs, dq, dq_acc, lse, delta
):
    """Processes one pair of blocks.

    Scratch: dq, and lse and delta as columns, repeated in all lanes.
    """
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    grid = table.grid
    j = key_block(table, b, i, step)

    @pl.when(step == 0)
    def _():
        dq_acc[...] = jnp.zeros_like(dq_acc)
        lse[...] = jnp.broadcast_to(refs["lse"][0, 0].T, lse.shape)
        delta[...] = jnp.broadcast_to(refs["delta"][0, 0].T, delta.shape)

    def visit(masked: bool):
        q, k, v, dz = (refs[name][0, 0] for name in ("q", "k", "v", "dz"))
        if masked and grid.end_of_keys:
            start = j * grid.block_keys
            k, v = (fill_after(x, start, grid.num_keys) for x in (k, v))
        scores, slope = _scores(dot(q, k, ((1,), (1,))), spec)
        if masked:
            scores = online_softmax.hide(scores, allowed(table, refs, i, j))
        probs = jnp.exp2(scores - lse[:, :1])
        dprobs = dot(dz, v, ((1,), (1,)))
        dscores = online_softmax.dscores(probs, dprobs, delta[:, :1], slope)
        dq_acc[...] += dot(dscores.astype(k.dtype), k, ((1,), (0,)))

    first, end = table.key_range(b, i)
    visit_pair(table, b, i, j, visit, first + step < end)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq[0, 0] = (dq_acc[...] * spec.scale).astype(dq.dtype)


def _scores(raw, spec: AttentionSpec):
    """Returns the scores in base 2, and d scores / d raw without base and scale."""
    scores = online_softmax.scores_base_2(raw, spec.scale, spec.soft_cap)
    natural = scores / online_softmax.LOG2_E
    return scores, online_softmax.slope(natural, 1.0, spec.soft_cap)


def _key_value_gradients(
    spec: AttentionSpec, table: BlockTable, inputs, settings: TpuSettings
):
    """Sums over the query heads of each key head's group, one after another."""
    B, K, S, H = inputs["k"].shape
    group = inputs["q"].shape[1] // K

    def queries(b, n, j, g, i, table):
        return b, n * group + g, query_block(table, b, j, i)

    def keys(b, n, j, g, i, table):
        return b, n, j

    grid = table.grid
    inputs, in_specs = input_specs(spec.mask, grid, inputs, queries, keys)
    limits = bounds(spec.mask, grid)
    out = pl.BlockSpec((1, 1, grid.block_keys, H), lambda b, n, j, *_: (b, n, j, 0))
    shape = jax.ShapeDtypeStruct((B, K, S, H), inputs["k"].dtype)
    return run_kernel(
        partial(_key_value_kernel, spec),
        table,
        inputs,
        in_specs,
        grid=(B, K, grid.key_blocks, group, limits.queries),
        out_specs=(out, out),
        out_shape=(shape, shape),
        scratch=[(grid.block_keys, H)] * 2,
        matmuls=4 * limits.pairs,
        settings=settings,
    )


def _key_value_kernel(
    spec: AttentionSpec, table: BlockTable, refs, dk, dv, dk_acc, dv_acc
):
    """Processes one pair of blocks, with scores [keys, queries] to avoid transposes."""
    b, j, g, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    i = query_block(table, b, j, step)
    grid = table.grid
    partial_queries = grid.num_queries % grid.block_queries != 0

    @pl.when((g == 0) & (step == 0))
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def visit(masked: bool):
        q, k, v, dz = (refs[name][0, 0] for name in ("q", "k", "v", "dz"))
        lse, delta = (refs[name][0, 0] for name in ("lse", "delta"))
        if masked and partial_queries:
            start, end = i * grid.block_queries, grid.num_queries
            q, dz = (fill_after(x, start, end) for x in (q, dz))
            delta = fill_after(delta, start, end, axis=1)
            lse = fill_after(lse, start, end, axis=1, fill=-MASKED)
        scores, slope = _scores(dot(k, q, ((1,), (1,))), spec)
        if masked:
            visible = allowed(table, refs, i, j, keys_first=True)
            scores = online_softmax.hide(scores, visible)
        probs = jnp.exp2(scores - lse)
        dprobs = dot(v, dz, ((1,), (1,)))
        dscores = online_softmax.dscores(probs, dprobs, delta, slope)
        dv_acc[...] += dot(probs.astype(dz.dtype), dz, ((1,), (0,)))
        dk_acc[...] += dot(dscores.astype(q.dtype), q, ((1,), (0,)))

    first, end = table.query_range(b, j)
    is_full = None
    if partial_queries:
        is_full = (i + 1) * grid.block_queries <= grid.num_queries
    visit_pair(table, b, i, j, visit, first + step < end, is_full)

    is_last = (g == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1)

    @pl.when(is_last)
    def _():
        dk[0, 0] = (dk_acc[...] * spec.scale).astype(dk.dtype)
        dv[0, 0] = dv_acc[...].astype(dv.dtype)
