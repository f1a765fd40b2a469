"""The forward kernel of flash attention on TPUs, in Pallas (Mosaic).

FlashAttention-2 (Dao 2023, arXiv:2307.08691): for each block of queries, a loop over
blocks of keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
    run_kernel,
    visit_pair,
)


def forward(q, k, v, spec: AttentionSpec, settings: TpuSettings, splits: int = 1):
    """Computes z [B T N H] in q's dtype and lse [B N T] in f32; see `FlashKernels`.

    With splits, returns the results of each split of the keys, [B * splits, ...], f32.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    blocks = settings.block_queries, settings.block_keys
    table = cut_blocks(spec, T, S, blocks, splits)
    grid = table.grid
    limits = bounds(spec.mask, grid)

    def queries(b, n, i, j, table):
        return b // splits, n, i

    def keys(b, n, i, j, table):
        return b // splits, n // (N // K), key_block(table, b, i, j)

    inputs = {"q": heads_first(q), "k": heads_first(k), "v": heads_first(v)}
    if spec.key_scale is not None:
        for name in ("key_scale", "value_scale"):
            scale_BKS = getattr(spec, name).transpose(0, 2, 1)
            inputs[name] = scale_BKS[:, :, None].astype(jnp.float32)
    inputs, in_specs = input_specs(spec.mask, grid, inputs, queries, keys)
    if spec.sinks is not None:
        inputs["sinks"] = spec.sinks.astype(jnp.float32)
        in_specs["sinks"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    rows = grid.block_queries
    # Splits are rounded only after they are merged.
    dtype = jnp.float32 if splits > 1 else q.dtype
    z, lse = run_kernel(
        partial(_forward_kernel, spec),
        table,
        inputs,
        in_specs,
        grid=(B * splits, N, grid.query_blocks, limits.keys),
        out_specs=(
            pl.BlockSpec((1, 1, rows, H), lambda b, n, i, *_: (b, n, i, 0)),
            pl.BlockSpec((1, 1, 1, rows), lambda b, n, i, *_: (b, n, 0, i)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B * splits, N, T, H), dtype),
            jax.ShapeDtypeStruct((B * splits, N, 1, T), jnp.float32),
        ),
        scratch=[(rows, width) for width in (LANES, LANES, H)],
        matmuls=2 * limits.pairs,
        settings=settings,
    )
    return heads_first(z), lse[:, :, 0]


def _forward_kernel(spec: AttentionSpec, table: BlockTable, refs, z, lse, m, l, acc):
    """Processes one pair of blocks.

    Scratch: m, l and acc of the online softmax in base 2, with m and l repeated in all
    lanes.
    """
    b, n, i, step = (pl.program_id(axis) for axis in range(4))
    grid = table.grid
    j = key_block(table, b, i, step)

    @pl.when(step == 0)
    def _():
        m[...] = jnp.full_like(m, MASKED)
        l[...] = jnp.zeros_like(l)
        acc[...] = jnp.zeros_like(acc)

    def visit(masked: bool):
        start = j * grid.block_keys
        q, k, v = (refs[name][0, 0] for name in "qkv")
        if "key_scale" in refs:
            k, v = (x.astype(jnp.float32).astype(q.dtype) for x in (k, v))
        if masked and grid.end_of_keys:
            v = fill_after(v, start, grid.num_keys)
        raw = dot(q, k, ((1,), (1,)))
        if "key_scale" in refs:
            raw *= refs["key_scale"][0, 0]
        scores = online_softmax.scores_base_2(raw, spec.scale, spec.soft_cap)
        if masked:
            scores = online_softmax.hide(scores, allowed(table, refs, i, j))
        m_old = m[:, :1]
        m_new = jnp.maximum(m_old, jnp.max(scores, axis=1, keepdims=True))
        p, alpha = jnp.exp2(scores - m_new), jnp.exp2(m_old - m_new)
        sums = jnp.sum(p, axis=1, keepdims=True)
        m[...] = jnp.broadcast_to(m_new, m.shape)
        l[...] = l[...] * alpha + sums
        if "value_scale" in refs:
            scale = refs["value_scale"][0, 0]
            if masked and grid.end_of_keys:
                scale = fill_after(scale, start, grid.num_keys, axis=1)
            p *= scale
        part = dot(p.astype(v.dtype), v, ((1,), (0,)))
        acc[...] = acc[...] * alpha + part

    first, end = table.key_range(b, i)
    visit_pair(table, b, i, j, visit, first + step < end)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        sink = refs["sinks"][n] if "sinks" in refs else None
        m_natural = m[:, :1] / online_softmax.LOG2_E
        factor, row_lse = online_softmax.finish(m_natural, l[:, :1], sink)
        z[0, 0] = (acc[...] * factor).astype(z.dtype)
        lse[0, 0] = row_lse.T
