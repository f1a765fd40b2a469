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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention import formulas
from jaxlm.ops.attention.flash import Kernels, flash_attention
from jaxlm.ops.attention.mask import may_attend
from jaxlm.ops.attention.request import Request
from jaxlm.ops.attention.settings import measured, settings_key
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, dequantize
from jaxlm.ops.attention.visibility import (
    Extent,
    Grid,
    Table,
    bounds,
    make_table,
    meet,
)

LANES = 128
# Up to so many queries take the decode form.
DECODE_QUERIES = 8


@dataclass(frozen=True)
class Settings:
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
    settings: Settings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention, and the log-sum-exp of its scores.

    f32 and bf16, any lengths, int8 keys. Up to `DECODE_QUERIES` queries whose places
    are given take a form that reads each key once for all query heads that it serves.
    """
    kernels = Kernels(_forward, _backward, settings or settings_for(q))
    return flash_attention(kernels, q, k, v, spec)


def settings_for(q: Array) -> Settings:
    """What was measured for such queries, else blocks that fit the fast memory."""
    wide = q.shape[-1] > LANES or q.dtype == jnp.float32
    default = Settings(256, 512, 256, 256) if wide else Settings()
    return measured(settings_key("pallas_tpu", q), default)


def declines(asked: Request) -> str | None:
    """Why these kernels cannot do what is asked; None: they can."""
    if asked.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{asked.dtype.name} does not load on a TPU"
    if asked.head_dim > 256:
        return f"head_dim {asked.head_dim} is above 256"
    return None


def _forward(q, k, v, spec: AttentionSpec, settings: Settings):
    """z in q's dtype and lse; see `flash.Kernels`."""
    if spec.query_index is not None and q.shape[1] <= DECODE_QUERIES:
        return _decode(q, k, v, spec, settings)
    k, v, spec = dequantize(k, v, spec, q.dtype)
    return _attend(q, k, v, spec, settings)


def _decode(q, k, v, spec: AttentionSpec, settings: Settings):
    """Few queries: all queries of a key head are the rows of one block."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    rows = q.reshape(B, T, K, G, H).swapaxes(2, 3).reshape(B, T * G, K, H)

    def repeat(x):
        return None if x is None else jnp.repeat(x, G, axis=1)

    row_spec = replace(
        spec,
        sinks=None,
        query_index=repeat(spec.query_index),
        query_segments=repeat(spec.query_segments),
    )
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


class Plan(NamedTuple):
    """What a kernel knows when it is traced."""

    spec: AttentionSpec
    """Its numbers; the arrays are inputs."""
    grid: Grid
    rows: int
    """Rows of the table: one for each row of the batch (and split), or 1."""

    def row(self, b: Any) -> Any:
        return b if self.rows > 1 else 0

    def key_block(self, table: Table, b: Any, i: Any, j: Any) -> Any:
        """Number of the j-th key block that query block i meets, or of the last one."""
        at = self.row(b) * self.grid.query_blocks + i
        last = jnp.maximum(table.last_key[at] - 1, table.first_key[at])
        return jnp.minimum(table.first_key[at] + j, last)

    def query_block(self, table: Table, b: Any, j: Any, i: Any) -> Any:
        at = self.row(b) * self.grid.key_blocks + j
        last = jnp.maximum(table.last_query[at] - 1, table.first_query[at])
        return jnp.minimum(table.first_query[at] + i, last)

    def meet(self, table: Table, b: Any, i: Any, j: Any) -> tuple[Any, Any]:
        """`visibility.meet` of query block i and key block j."""
        row = self.row(b)

        def extent(extents: Extent, at: Any) -> Extent:
            return Extent(*(None if x is None else x[at] for x in extents))

        return meet(
            extent(table.queries, row * self.grid.query_blocks + i),
            extent(table.keys, row * self.grid.key_blocks + j),
            table.length[row],
            causal=self.spec.causal,
            window=self.spec.window,
        )

    @property
    def partial_queries(self) -> bool:
        return self.grid.num_queries % self.grid.block_queries != 0

    @property
    def partial_keys(self) -> bool:
        return self.grid.num_keys % self.grid.block_keys != 0


def _plan(spec: AttentionSpec, T: int, S: int, blocks: tuple[int, int], splits: int):
    """The plan of a kernel and its table."""
    # Blocks longer than the row help nobody.
    sizes = (
        min(block, pl.cdiv(n, LANES) * LANES)
        for n, block in zip((T, S), blocks, strict=True)
    )
    grid = Grid(T, S, *sizes)
    table = make_table(spec, grid)
    if splits > 1:
        table = _split(table, grid, splits)
    plan = Plan(spec, grid, table.length.shape[0])
    return plan, table


def _split(table: Table, grid: Grid, splits: int) -> Table:
    """The table with a row for each part of each row's key blocks."""

    def repeat(x: Array) -> Array:
        x = x.reshape(table.length.shape[0], 1, -1)
        return jnp.broadcast_to(x, (x.shape[0], splits, x.shape[2]))

    table = jax.tree.map(repeat, table)
    share = -(-(table.last_key - table.first_key) // splits)
    first = table.first_key + share * jnp.arange(splits)[:, None]
    last = jnp.minimum(first + share, table.last_key)
    # Parts without keys must not name a block after the last.
    first, last = (jnp.where(first < last, x, 0) for x in (first, last))
    table = replace(table, first_key=first, last_key=last)
    return jax.tree.map(jnp.ravel, table)


def _attend(q, k, v, spec: AttentionSpec, settings: Settings, splits: int = 1):
    """z [B T N H] and lse [B N T]; with splits, their parts: [B * splits, ...]."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    blocks = settings.block_queries, settings.block_keys
    plan, table = _plan(spec, T, S, blocks, splits)
    grid = plan.grid
    met = bounds(spec, grid)

    def queries(b, n, i, j, table):
        return b // splits, n, i, 0

    def keys(b, n, i, j, table):
        return b // splits, n // (N // K), plan.key_block(table, b, i, j), 0

    def query_row(b, n, i, j, table):
        return b // splits, 0, i

    def key_row(b, n, i, j, table):
        return b // splits, 0, plan.key_block(table, b, i, j)

    def key_head_row(b, n, i, j, table):
        return b // splits, n // (N // K), 0, plan.key_block(table, b, i, j)

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
        partial(_forward_kernel, plan),
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
        products=2 * met.pairs,
        settings=settings,
    )
    return z.transpose(0, 2, 1, 3), lse[:, :, 0]


def _forward_kernel(plan: Plan, table: Table, refs, z, lse, top, weight, total):
    """One pair of blocks. Scratch: `top` and `weight` of the online softmax, each
    number in all lanes of its row, and `total`, the weighted sum of values."""
    b, n, i, step = (pl.program_id(axis) for axis in range(4))
    j = plan.key_block(table, b, i, step)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, MASKED)
        weight[...] = jnp.zeros_like(weight)
        total[...] = jnp.zeros_like(total)

    def visit(masked: bool):
        start = j * plan.grid.block_keys
        q, k, v = (refs[name][0, 0] for name in "qkv")
        if "key_scale" in refs:
            k, v = (x.astype(jnp.float32).astype(q.dtype) for x in (k, v))
        if masked and plan.partial_keys:
            v = _fill_after(v, start, plan.grid.num_keys)
        raw = _product(q, k, ((1,), (1,)))
        if "key_scale" in refs:
            raw *= refs["key_scale"][0, 0]
        scores = formulas.scores(raw, plan.spec.scale, plan.spec.soft_cap)
        if masked:
            scores = formulas.hide(scores, _allowed(plan, table, refs, b, i, j))
        old = top[:, :1]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        probs, shrink = jnp.exp(scores - new), jnp.exp(old - new)
        sums = jnp.sum(probs, axis=1, keepdims=True)
        top[...] = jnp.broadcast_to(new, top.shape)
        weight[...] = weight[...] * shrink + sums
        if "value_scale" in refs:
            scale = refs["value_scale"][0, 0]
            if masked and plan.partial_keys:
                scale = _fill_after(scale, start, plan.grid.num_keys, axis=1)
            probs *= scale
        part = _product(probs.astype(v.dtype), v, ((1,), (0,)))
        total[...] = total[...] * shrink + part

    at = plan.row(b) * plan.grid.query_blocks + i
    some, whole = plan.meet(table, b, i, j)
    some &= table.first_key[at] + step < table.last_key[at]
    pl.when(some & whole)(partial(visit, masked=False))
    pl.when(some & ~whole)(partial(visit, masked=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        sink = refs["sinks"][n] if "sinks" in refs else None
        factor, row_lse = formulas.finish(top[:, :1], weight[:, :1], sink)
        z[0, 0] = (total[...] * factor).astype(z.dtype)
        lse[0, 0] = row_lse.T


def _backward(q, k, v, spec: AttentionSpec, lse, delta, dz, settings: Settings):
    """dq, dk and dv; see `flash.Kernels`."""
    T, S = q.shape[1], k.shape[1]
    blocks = settings.backward_block_queries, settings.backward_block_keys
    plan, table = _plan(spec, T, S, blocks, 1)
    arrays = {"q": q, "k": k, "v": v, "dz": dz}
    inputs = {name: _heads_first(x) for name, x in arrays.items()}
    inputs |= {"lse": lse[:, :, None], "delta": delta[:, :, None]}
    dq = _query_gradient(plan, table, inputs, settings)
    dk, dv = _key_value_gradients(plan, table, inputs, settings)
    return tuple(x.transpose(0, 2, 1, 3) for x in (dq, dk, dv))


def _backward_specs(plan: Plan, inputs, queries: Callable, keys: Callable):
    """Inputs and their blocks, from maps to (b, head, block) of both sides."""
    grid, H = plan.grid, inputs["q"].shape[-1]

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
    _add_rows(inputs, specs, plan.spec, grid, all_heads(queries), all_heads(keys))
    return inputs, specs


def _query_gradient(plan: Plan, table: Table, inputs, settings: Settings):
    B, N, T, H = inputs["q"].shape
    group = N // inputs["k"].shape[1]

    def queries(b, n, i, j, table):
        return b, n, i

    def keys(b, n, i, j, table):
        return b, n // group, plan.key_block(table, b, i, j)

    inputs, in_specs = _backward_specs(plan, inputs, queries, keys)
    grid = plan.grid
    met = bounds(plan.spec, grid)
    return _call(
        partial(_query_gradient_kernel, plan),
        table,
        inputs,
        in_specs,
        grid=(B, N, grid.query_blocks, met.keys),
        out_specs=pl.BlockSpec(
            (1, 1, grid.block_queries, H), lambda b, n, i, *_: (b, n, i, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((B, N, T, H), inputs["q"].dtype),
        scratch=[(grid.block_queries, H)],
        products=3 * met.pairs,
        settings=settings,
    )


def _query_gradient_kernel(plan: Plan, table: Table, refs, dq, total):
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j = plan.key_block(table, b, i, step)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def visit(masked: bool):
        q, k, v, dz = (refs[name][0, 0] for name in ("q", "k", "v", "dz"))
        if masked and plan.partial_keys:
            start = j * plan.grid.block_keys
            k, v = (_fill_after(x, start, plan.grid.num_keys) for x in (k, v))
        lse, delta = (refs[name][0, 0].T for name in ("lse", "delta"))
        raw = _product(q, k, ((1,), (1,)))
        scores = formulas.scores(raw, plan.spec.scale, plan.spec.soft_cap)
        slope = formulas.slope(scores, plan.spec.scale, plan.spec.soft_cap)
        if masked:
            scores = formulas.hide(scores, _allowed(plan, table, refs, b, i, j))
        probs = jnp.exp(scores - lse)
        dprobs = _product(dz, v, ((1,), (1,)))
        dscores = formulas.dscores(probs, dprobs, delta, slope)
        total[...] += _product(dscores.astype(k.dtype), k, ((1,), (0,)))

    at = plan.row(b) * plan.grid.query_blocks + i
    some, whole = plan.meet(table, b, i, j)
    some &= table.first_key[at] + step < table.last_key[at]
    pl.when(some & whole)(partial(visit, masked=False))
    pl.when(some & ~whole)(partial(visit, masked=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq[0, 0] = total[...].astype(dq.dtype)


def _key_value_gradients(plan: Plan, table: Table, inputs, settings: Settings):
    """Each key head sums over its group, one query head after another."""
    B, K, S, H = inputs["k"].shape
    group = inputs["q"].shape[1] // K

    def queries(b, n, j, g, i, table):
        return b, n * group + g, plan.query_block(table, b, j, i)

    def keys(b, n, j, g, i, table):
        return b, n, j

    inputs, in_specs = _backward_specs(plan, inputs, queries, keys)
    grid = plan.grid
    met = bounds(plan.spec, grid)
    out = pl.BlockSpec((1, 1, grid.block_keys, H), lambda b, n, j, *_: (b, n, j, 0))
    shape = jax.ShapeDtypeStruct((B, K, S, H), inputs["k"].dtype)
    return _call(
        partial(_key_value_kernel, plan),
        table,
        inputs,
        in_specs,
        grid=(B, K, grid.key_blocks, group, met.queries),
        out_specs=(out, out),
        out_shape=(shape, shape),
        scratch=[(grid.block_keys, H)] * 2,
        products=4 * met.pairs,
        settings=settings,
    )


def _key_value_kernel(plan: Plan, table: Table, refs, dk, dv, dk_total, dv_total):
    """One pair of blocks, with scores [keys, queries]: no product transposes them."""
    b, j, g, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    i = plan.query_block(table, b, j, step)
    grid = plan.grid

    @pl.when((g == 0) & (step == 0))
    def _():
        dk_total[...] = jnp.zeros_like(dk_total)
        dv_total[...] = jnp.zeros_like(dv_total)

    def visit(masked: bool):
        q, k, v, dz = (refs[name][0, 0] for name in ("q", "k", "v", "dz"))
        lse, delta = (refs[name][0, 0] for name in ("lse", "delta"))
        if masked and plan.partial_queries:
            start, end = i * grid.block_queries, grid.num_queries
            q, dz = (_fill_after(x, start, end) for x in (q, dz))
            delta = _fill_after(delta, start, end, axis=1)
            lse = _fill_after(lse, start, end, axis=1, fill=-MASKED)
        raw = _product(k, q, ((1,), (1,)))
        scores = formulas.scores(raw, plan.spec.scale, plan.spec.soft_cap)
        slope = formulas.slope(scores, plan.spec.scale, plan.spec.soft_cap)
        if masked:
            allowed = _allowed(plan, table, refs, b, i, j, keys_first=True)
            scores = formulas.hide(scores, allowed)
        probs = jnp.exp(scores - lse)
        dprobs = _product(v, dz, ((1,), (1,)))
        dscores = formulas.dscores(probs, dprobs, delta, slope)
        dv_total[...] += _product(probs.astype(dz.dtype), dz, ((1,), (0,)))
        dk_total[...] += _product(dscores.astype(q.dtype), q, ((1,), (0,)))

    at = plan.row(b) * grid.key_blocks + j
    some, whole = plan.meet(table, b, i, j)
    some &= table.first_query[at] + step < table.last_query[at]
    if plan.partial_queries:
        whole &= (i + 1) * grid.block_queries <= grid.num_queries
    pl.when(some & whole)(partial(visit, masked=False))
    pl.when(some & ~whole)(partial(visit, masked=True))

    last = (g == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1)

    @pl.when(last)
    def _():
        dk[0, 0] = dk_total[...].astype(dk.dtype)
        dv[0, 0] = dv_total[...].astype(dv.dtype)


def _heads_first(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3)


def _product(a: Any, b: Any, dims: Any) -> Any:
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
    """x, whose first number on `axis` has place `start`, with `fill` from `end` on."""
    place = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(place < end, x, jnp.full_like(x, fill))


def _add_rows(inputs, in_specs, spec: AttentionSpec, grid: Grid, query_row, key_row):
    """Adds the places and segments of tokens, as rows [B, 1, tokens]."""
    rows = (
        ("places", spec.query_index, grid.block_queries, query_row),
        ("query_segments", spec.query_segments, grid.block_queries, query_row),
        ("key_segments", spec.key_segments, grid.block_keys, key_row),
    )
    for name, x, block, index in rows:
        if x is not None:
            inputs[name] = x[:, None]
            in_specs[name] = pl.BlockSpec((1, 1, block), index)


def _allowed(plan: Plan, table: Table, refs, b, i, j, keys_first: bool = False) -> Any:
    """Which scores of query block i and key block j are visible; None: all are."""
    grid, spec = plan.grid, plan.spec
    query_axis, key_axis = (1, 0) if keys_first else (0, 1)

    def places(start: Any, size: int, axis: int) -> Any:
        shape = (size, 1) if axis == 0 else (1, size)
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def read(name: str, axis: int) -> Any:
        if name not in refs:
            return None
        row = refs[name][0]
        return row if axis == 1 else row.T

    queries = read("places", query_axis)
    if queries is None:
        start = i * grid.block_queries
        queries = places(start, grid.block_queries, query_axis)
    limited = spec.key_length is not None or plan.partial_keys
    return may_attend(
        queries,
        places(j * grid.block_keys, grid.block_keys, key_axis),
        causal=spec.causal,
        window=spec.window,
        query_segment=read("query_segments", query_axis),
        key_segment=read("key_segments", key_axis),
        key_length=table.length[plan.row(b)] if limited else None,
    )


def _call(
    kernel: Callable,
    table: Table,
    inputs: dict[str, Array],
    in_specs: dict[str, pl.BlockSpec],
    *,
    grid: tuple[int, ...],
    out_specs: Any,
    out_shape: Any,
    scratch: list[tuple[int, int]],
    products: int,
    settings: Settings,
):
    """Runs a kernel whose last axes of the grid sum up: all after the third.

    Args:
      products: products of two blocks for each row of the batch and query head.
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
            flops=2 * products * B * N * area * H,
            transcendentals=products * B * N * area // 2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in leaves),
        ),
        interpret=settings.interpret,
    )(table, inputs)
