"""Flash attention on TPUs, in Pallas (Mosaic).

FlashAttention-2 (Dao 2023, arXiv:2307.08691): blocks of queries stay, blocks of keys
pass by; the backward pass has one kernel for the queries' gradient and one for that of
keys and values, each of which sums in a fixed order. Blocks lie as [tokens, head_dim],
so the arrays are transposed to [B, heads, tokens, H] outside. What reaches over the end
of a row is garbage (NaN in interpret mode): it is hidden or zeroed here, the caller
pads nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.flash import FlashKernels, flash_attention
from jaxlm.ops.attention.request import Request
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Tokens, dequantize
from jaxlm.ops.attention.tuning_cache import measured, settings_key
from jaxlm.ops.attention.visibility import BlockTable, Grid, bounds, make_table

LANES = 128
# Up to so many queries take the decode form.
DECODE_QUERIES = 8


@dataclass(frozen=True)
class TpuSettings:
    """Block sizes: multiples of 128 on a device."""

    block_queries: int = 512
    block_keys: int = 512
    backward_block_queries: int = 512
    backward_block_keys: int = 512
    decode_block_keys: int = 1024
    decode_splits: int = 1
    """Parts into which the keys of a row are cut when decoding: for chips with two
    cores, when there are fewer rows and heads than cores."""
    interpret: bool = False
    """Run on any device, without Mosaic: for tests."""


def attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: TpuSettings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention, and the log-sum-exp of its scores.

    f32 and bf16, any lengths, int8 keys. Up to `DECODE_QUERIES` queries whose positions
    are given take a form that reads each key once for all query heads that share it.
    """
    kernels = FlashKernels(_forward, _backward, settings or settings_for(q))
    return flash_attention(kernels, q, k, v, spec)


def settings_for(q: Array) -> TpuSettings:
    """What was measured for such queries, else blocks that fit the fast memory."""
    wide = q.shape[-1] > LANES or q.dtype == jnp.float32
    default = TpuSettings(256, 512, 256, 256) if wide else TpuSettings()
    return measured(settings_key("pallas_tpu", q), default)


def declines(request: Request) -> str | None:
    """Why these kernels cannot do what is asked; None: they can."""
    if request.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{request.dtype.name} does not load on a TPU"
    if request.head_dim > 256:
        return f"head_dim {request.head_dim} is above 256"
    return None


def _forward(q, k, v, spec: AttentionSpec, settings: TpuSettings):
    """z in q's dtype and lse; see `flash.FlashKernels`."""
    if spec.mask.query_positions is not None and q.shape[1] <= DECODE_QUERIES:
        return _decode(q, k, v, spec, settings)
    k, v, spec = dequantize(k, v, spec, q.dtype)
    return _attend(q, k, v, spec, settings)


def _decode(q, k, v, spec: AttentionSpec, settings: TpuSettings):
    """Few queries: all queries of a key head are the rows of one block."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    rows = q.reshape(B, T, K, G, H).swapaxes(2, 3).reshape(B, T * G, K, H)

    positions, segments = jax.tree.map(
        lambda x: jnp.repeat(x, G, axis=1), spec.mask.queries(T)
    )
    mask = replace(spec.mask, query_positions=positions, query_segments=segments)
    row_spec = replace(spec, mask=mask, sinks=None)
    splits = settings.decode_splits
    settings = replace(settings, block_keys=settings.decode_block_keys)
    z, lse = _attend(rows, k, v, row_spec, settings, splits)
    z = z.reshape(B, splits, T, G, K, H)
    lse = lse.reshape(B, splits, K, T, G)
    return _merge(z, lse, spec.sinks, q)


def _merge(z_BPTGKH, lse_BPKTG, sinks, q):
    """Attention over all keys, from that over P parts of them, and the sinks."""
    total = jax.nn.logsumexp(lse_BPKTG, axis=1)
    if sinks is not None:
        K, G = lse_BPKTG.shape[2], lse_BPKTG.shape[4]
        sinks = sinks.astype(jnp.float32).reshape(K, 1, G)
        total = jnp.logaddexp(total, sinks)
    share = jnp.exp(lse_BPKTG - total[:, None])
    # Elementwise: a product of matrices would round to bf16.
    share = share.transpose(0, 1, 3, 4, 2)[..., None]
    z = jnp.sum(z_BPTGKH.astype(jnp.float32) * share, axis=1).swapaxes(2, 3)
    B, T, N, _ = q.shape
    return z.reshape(q.shape).astype(q.dtype), total.swapaxes(2, 3).reshape(B, N, T)


def _make_table(
    spec: AttentionSpec, T: int, S: int, blocks: tuple[int, int], splits: int = 1
) -> BlockTable:
    """The table of a kernel; with splits, a row for each part of each row's keys."""
    # Blocks longer than the row help nobody.
    sizes = (
        min(block, pl.cdiv(n, LANES) * LANES)
        for n, block in zip((T, S), blocks, strict=True)
    )
    table = make_table(spec.mask, Grid(T, S, *sizes))
    return _split(table, splits) if splits > 1 else table


def _key_block(table: BlockTable, b: Any, i: Any, step: Any) -> Any:
    """The key block that query block i meets at this step, or the last one."""
    first, last = table.keys_met(b, i)
    return jnp.minimum(first + step, jnp.maximum(last - 1, first))


def _query_block(table: BlockTable, b: Any, j: Any, step: Any) -> Any:
    """The query block that key block j meets at this step, or the last one."""
    first, last = table.queries_met(b, j)
    return jnp.minimum(first + step, jnp.maximum(last - 1, first))


def _split(table: BlockTable, splits: int) -> BlockTable:
    """The table with a row for each part of each row's key blocks."""
    rows = table.rows

    def repeat(x: Array) -> Array:
        x = x.reshape(rows, 1, -1)
        return jnp.broadcast_to(x, (x.shape[0], splits, x.shape[2]))

    table = jax.tree.map(repeat, table)
    share = -(-(table.last_key - table.first_key) // splits)
    first = table.first_key + share * jnp.arange(splits)[:, None]
    last = jnp.minimum(first + share, table.last_key)
    # Parts without keys must not name a block after the last.
    first, last = (jnp.where(first < last, x, 0) for x in (first, last))
    table = replace(table, first_key=first, last_key=last)
    return jax.tree.map(jnp.ravel, table)


def _attend(q, k, v, spec: AttentionSpec, settings: TpuSettings, splits: int = 1):
    """z [B T N H] and lse [B N T]; with splits, their parts: [B * splits, ...]."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    blocks = settings.block_queries, settings.block_keys
    table = _make_table(spec, T, S, blocks, splits)
    grid = table.grid
    met = bounds(spec.mask, grid)

    def queries(b, n, i, j, table):
        return b // splits, n, i, 0

    def keys(b, n, i, j, table):
        return b // splits, n // (N // K), _key_block(table, b, i, j), 0

    def query_row(b, n, i, j, table):
        return b // splits, 0, i

    def key_row(b, n, i, j, table):
        return b // splits, 0, _key_block(table, b, i, j)

    def key_head_row(b, n, i, j, table):
        return b // splits, n // (N // K), 0, _key_block(table, b, i, j)

    inputs = {"q": _heads_first(q), "k": _heads_first(k), "v": _heads_first(v)}
    in_specs = {
        "q": pl.BlockSpec((1, 1, grid.block_queries, H), queries),
        "k": pl.BlockSpec((1, 1, grid.block_keys, H), keys),
        "v": pl.BlockSpec((1, 1, grid.block_keys, H), keys),
    }
    _add_rows(inputs, in_specs, spec, grid, query_row, key_row)
    if spec.sinks is not None:
        inputs["sinks"] = spec.sinks.astype(jnp.float32)
        in_specs["sinks"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    if spec.key_scale is not None:
        for name in ("key_scale", "value_scale"):
            scale_BKS = getattr(spec, name).transpose(0, 2, 1)
            inputs[name] = scale_BKS[:, :, None].astype(jnp.float32)
            in_specs[name] = pl.BlockSpec((1, 1, 1, grid.block_keys), key_head_row)
    z, lse = _call(
        partial(_forward_kernel, spec),
        table,
        inputs,
        in_specs,
        grid=(B * splits, N, grid.query_blocks, met.keys),
        out_specs=(
            pl.BlockSpec(
                (1, 1, grid.block_queries, H), lambda b, n, i, *_: (b, n, i, 0)
            ),
            pl.BlockSpec(
                (1, 1, 1, grid.block_queries), lambda b, n, i, *_: (b, n, 0, i)
            ),
        ),
        out_shape=(
            # Parts are rounded when they are one.
            jax.ShapeDtypeStruct(
                (B * splits, N, T, H), jnp.float32 if splits > 1 else q.dtype
            ),
            jax.ShapeDtypeStruct((B * splits, N, 1, T), jnp.float32),
        ),
        scratch=[
            (grid.block_queries, LANES),
            (grid.block_queries, LANES),
            (grid.block_queries, H),
        ],
        matmuls=2 * met.pairs,
        settings=settings,
    )
    return z.transpose(0, 2, 1, 3), lse[:, :, 0]


def _forward_kernel(spec: AttentionSpec, table: BlockTable, refs, z, lse, m, l, acc):
    """One pair of blocks. Scratch: m, l and acc of the online softmax; each m and l
    lies in all lanes of its row."""
    b, n, i, step = (pl.program_id(axis) for axis in range(4))
    grid = table.grid
    j = _key_block(table, b, i, step)

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
            v = _fill_after(v, start, grid.num_keys)
        raw = _dot(q, k, ((1,), (1,)))
        if "key_scale" in refs:
            raw *= refs["key_scale"][0, 0]
        scores = online_softmax.scores(raw, spec.scale, spec.soft_cap)
        if masked:
            scores = online_softmax.hide(scores, _allowed(table, refs, i, j))
        m_old = m[:, :1]
        m_new = jnp.maximum(m_old, jnp.max(scores, axis=1, keepdims=True))
        p, alpha = jnp.exp(scores - m_new), jnp.exp(m_old - m_new)
        sums = jnp.sum(p, axis=1, keepdims=True)
        m[...] = jnp.broadcast_to(m_new, m.shape)
        l[...] = l[...] * alpha + sums
        if "value_scale" in refs:
            scale = refs["value_scale"][0, 0]
            if masked and grid.end_of_keys:
                scale = _fill_after(scale, start, grid.num_keys, axis=1)
            p *= scale
        part = _dot(p.astype(v.dtype), v, ((1,), (0,)))
        acc[...] = acc[...] * alpha + part

    some, whole = table.meet(table.query_extent(b, i), table.key_extent(b, j))
    first, last = table.keys_met(b, i)
    some &= first + step < last
    pl.when(some & whole)(partial(visit, masked=False))
    pl.when(some & ~whole)(partial(visit, masked=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        sink = refs["sinks"][n] if "sinks" in refs else None
        factor, row_lse = online_softmax.finish(m[:, :1], l[:, :1], sink)
        z[0, 0] = (acc[...] * factor).astype(z.dtype)
        lse[0, 0] = row_lse.T


def _backward(q, k, v, spec: AttentionSpec, lse, delta, dz, settings: TpuSettings):
    """dq, dk and dv; see `flash.FlashKernels`."""
    T, S = q.shape[1], k.shape[1]
    blocks = settings.backward_block_queries, settings.backward_block_keys
    table = _make_table(spec, T, S, blocks)
    arrays = {"q": q, "k": k, "v": v, "dz": dz}
    inputs = {name: _heads_first(x) for name, x in arrays.items()}
    inputs |= {"lse": lse[:, :, None], "delta": delta[:, :, None]}
    dq = _query_gradient(spec, table, inputs, settings)
    dk, dv = _key_value_gradients(spec, table, inputs, settings)
    return tuple(x.transpose(0, 2, 1, 3) for x in (dq, dk, dv))


def _backward_specs(
    spec: AttentionSpec, grid: Grid, inputs, queries: Callable, keys: Callable
):
    """Inputs and their blocks, from maps to (b, head, block) of both sides."""
    H = inputs["q"].shape[-1]

    def block(at: Callable, size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, size, H), lambda *ids: (*at(*ids), 0))

    def row(at: Callable, size: int) -> pl.BlockSpec:
        def index(*ids):
            b, n, i = at(*ids)
            return b, n, 0, i

        return pl.BlockSpec((1, 1, 1, size), index)

    def all_heads(at: Callable) -> Callable:
        def index(*ids):
            b, _, i = at(*ids)
            return b, 0, i

        return index

    inputs = dict(inputs)
    specs = {name: block(queries, grid.block_queries) for name in ("q", "dz")}
    specs |= {name: block(keys, grid.block_keys) for name in ("k", "v")}
    specs |= {name: row(queries, grid.block_queries) for name in ("lse", "delta")}
    _add_rows(inputs, specs, spec, grid, all_heads(queries), all_heads(keys))
    return inputs, specs


def _query_gradient(
    spec: AttentionSpec, table: BlockTable, inputs, settings: TpuSettings
):
    B, N, T, H = inputs["q"].shape
    group = N // inputs["k"].shape[1]

    def queries(b, n, i, j, table):
        return b, n, i

    def keys(b, n, i, j, table):
        return b, n // group, _key_block(table, b, i, j)

    grid = table.grid
    inputs, in_specs = _backward_specs(spec, grid, inputs, queries, keys)
    met = bounds(spec.mask, grid)
    return _call(
        partial(_query_gradient_kernel, spec),
        table,
        inputs,
        in_specs,
        grid=(B, N, grid.query_blocks, met.keys),
        out_specs=pl.BlockSpec(
            (1, 1, grid.block_queries, H), lambda b, n, i, *_: (b, n, i, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((B, N, T, H), inputs["q"].dtype),
        scratch=[(grid.block_queries, H)],
        matmuls=3 * met.pairs,
        settings=settings,
    )


def _query_gradient_kernel(spec: AttentionSpec, table: BlockTable, refs, dq, total):
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    grid = table.grid
    j = _key_block(table, b, i, step)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def visit(masked: bool):
        q, k, v, dz = (refs[name][0, 0] for name in ("q", "k", "v", "dz"))
        if masked and grid.end_of_keys:
            start = j * grid.block_keys
            k, v = (_fill_after(x, start, grid.num_keys) for x in (k, v))
        lse, delta = (refs[name][0, 0].T for name in ("lse", "delta"))
        raw = _dot(q, k, ((1,), (1,)))
        scores = online_softmax.scores(raw, spec.scale, spec.soft_cap)
        slope = online_softmax.slope(scores, spec.scale, spec.soft_cap)
        if masked:
            scores = online_softmax.hide(scores, _allowed(table, refs, i, j))
        probs = jnp.exp(scores - lse)
        dprobs = _dot(dz, v, ((1,), (1,)))
        dscores = online_softmax.dscores(probs, dprobs, delta, slope)
        total[...] += _dot(dscores.astype(k.dtype), k, ((1,), (0,)))

    some, whole = table.meet(table.query_extent(b, i), table.key_extent(b, j))
    first, last = table.keys_met(b, i)
    some &= first + step < last
    pl.when(some & whole)(partial(visit, masked=False))
    pl.when(some & ~whole)(partial(visit, masked=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq[0, 0] = total[...].astype(dq.dtype)


def _key_value_gradients(
    spec: AttentionSpec, table: BlockTable, inputs, settings: TpuSettings
):
    """Each key head sums over its group, one query head after another."""
    B, K, S, H = inputs["k"].shape
    group = inputs["q"].shape[1] // K

    def queries(b, n, j, g, i, table):
        return b, n * group + g, _query_block(table, b, j, i)

    def keys(b, n, j, g, i, table):
        return b, n, j

    grid = table.grid
    inputs, in_specs = _backward_specs(spec, grid, inputs, queries, keys)
    met = bounds(spec.mask, grid)
    out = pl.BlockSpec((1, 1, grid.block_keys, H), lambda b, n, j, *_: (b, n, j, 0))
    shape = jax.ShapeDtypeStruct((B, K, S, H), inputs["k"].dtype)
    return _call(
        partial(_key_value_kernel, spec),
        table,
        inputs,
        in_specs,
        grid=(B, K, grid.key_blocks, group, met.queries),
        out_specs=(out, out),
        out_shape=(shape, shape),
        scratch=[(grid.block_keys, H)] * 2,
        matmuls=4 * met.pairs,
        settings=settings,
    )


def _key_value_kernel(
    spec: AttentionSpec, table: BlockTable, refs, dk, dv, dk_total, dv_total
):
    """One pair of blocks, with scores [keys, queries]: no product transposes them."""
    b, j, g, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    i = _query_block(table, b, j, step)
    grid = table.grid
    partial_queries = grid.num_queries % grid.block_queries != 0

    @pl.when((g == 0) & (step == 0))
    def _():
        dk_total[...] = jnp.zeros_like(dk_total)
        dv_total[...] = jnp.zeros_like(dv_total)

    def visit(masked: bool):
        q, k, v, dz = (refs[name][0, 0] for name in ("q", "k", "v", "dz"))
        lse, delta = (refs[name][0, 0] for name in ("lse", "delta"))
        if masked and partial_queries:
            start, end = i * grid.block_queries, grid.num_queries
            q, dz = (_fill_after(x, start, end) for x in (q, dz))
            delta = _fill_after(delta, start, end, axis=1)
            lse = _fill_after(lse, start, end, axis=1, fill=-MASKED)
        raw = _dot(k, q, ((1,), (1,)))
        scores = online_softmax.scores(raw, spec.scale, spec.soft_cap)
        slope = online_softmax.slope(scores, spec.scale, spec.soft_cap)
        if masked:
            allowed = _allowed(table, refs, i, j, keys_first=True)
            scores = online_softmax.hide(scores, allowed)
        probs = jnp.exp(scores - lse)
        dprobs = _dot(v, dz, ((1,), (1,)))
        dscores = online_softmax.dscores(probs, dprobs, delta, slope)
        dv_total[...] += _dot(probs.astype(dz.dtype), dz, ((1,), (0,)))
        dk_total[...] += _dot(dscores.astype(q.dtype), q, ((1,), (0,)))

    some, whole = table.meet(table.query_extent(b, i), table.key_extent(b, j))
    first, last = table.queries_met(b, j)
    some &= first + step < last
    if partial_queries:
        whole &= (i + 1) * grid.block_queries <= grid.num_queries
    pl.when(some & whole)(partial(visit, masked=False))
    pl.when(some & ~whole)(partial(visit, masked=True))

    ends = (g == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1)

    @pl.when(ends)
    def _():
        dk[0, 0] = dk_total[...].astype(dk.dtype)
        dv[0, 0] = dv_total[...].astype(dv.dtype)


def _heads_first(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3)


def _dot(a: Any, b: Any, dims: Any) -> Any:
    """Products accumulate in f32; those of f32 numbers are not rounded before."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (dims, ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


def _fill_after(x: Any, start: Any, end: int, axis: int = 0, fill: float = 0.0) -> Any:
    """x, whose first number on `axis` is at `start`, with `fill` from `end` on."""
    position = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(position < end, x, jnp.full_like(x, fill))


def _add_rows(inputs, in_specs, spec: AttentionSpec, grid: Grid, query_row, key_row):
    """Adds the positions and segments of tokens, as rows [B, 1, tokens]."""
    mask = spec.mask
    rows = (
        ("query_positions", grid.block_queries, query_row),
        ("query_segments", grid.block_queries, query_row),
        ("key_segments", grid.block_keys, key_row),
    )
    for name, block, index in rows:
        x = getattr(mask, name)
        if x is not None:
            x = jnp.broadcast_to(x, (inputs["q"].shape[0], x.shape[1]))
            inputs[name] = x[:, None]
            in_specs[name] = pl.BlockSpec((1, 1, block), index)


def _allowed(table: BlockTable, refs, i, j, keys_first: bool = False) -> Any:
    """Which scores of query block i and key block j are visible; None: all are."""
    grid = table.grid
    query_axis, key_axis = (1, 0) if keys_first else (0, 1)

    def count(start: Any, size: int, axis: int) -> Any:
        shape = (size, 1) if axis == 0 else (1, size)
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def read(name: str, axis: int) -> Any:
        if name not in refs:
            return None
        row = refs[name][0]
        return row if axis == 1 else row.T

    positions = read("query_positions", query_axis)
    if positions is None:
        positions = count(i * grid.block_queries, grid.block_queries, query_axis)
    queries = Tokens(positions, read("query_segments", query_axis))
    positions = count(j * grid.block_keys, grid.block_keys, key_axis)
    keys = Tokens(positions, read("key_segments", key_axis))
    return table.mask.allowed(queries, keys, grid.end_of_keys)


def _call(
    kernel: Callable,
    table: BlockTable,
    inputs: dict[str, Array],
    in_specs: dict[str, pl.BlockSpec],
    *,
    grid: tuple[int, ...],
    out_specs: Any,
    out_shape: Any,
    scratch: list[tuple[int, int]],
    matmuls: int,
    settings: TpuSettings,
):
    """Runs a kernel whose last axes of the grid sum up: all after the third.

    Args:
      matmuls: matrix products of two blocks for each row of the batch and query head.
    """
    B, N, _, H = inputs["q"].shape
    area = in_specs["q"].block_shape[2] * in_specs["k"].block_shape[2]
    leaves = jax.tree.leaves((inputs, out_shape))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[in_specs],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * B * N * area * H,
            transcendentals=matmuls * B * N * area // 2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in leaves),
        ),
        interpret=settings.interpret,
    )(table, inputs)
