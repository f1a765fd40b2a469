"""Attention of few queries over a long cache, for Hopper, in Pallas Mosaic GPU.

Flash-Decoding (Dao, Haziza, Massa and Sizov 2023): one query would keep only one
multiprocessor busy, so the keys of a row are split, and the splits run in parallel.
Each split gives a normalized result and its log-sum-exp, with which the splits are
merged. The queries that share a key head are the rows of one matrix, so that each key
is read once for all of them.

Reading the cache limits the speed: int8 is copied as int8 and cast in the kernel, where
the key scales multiply the scores, and the value scales the probabilities.

Shape letters: B batch, T queries, S keys, N query heads, K key heads, H head dimension,
P splits, and R rows, the T * N / K queries of a key head.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.block_skipping import Grid, make_table
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.gpu.warpgroup import (
    ROWS,
    SHARED_BYTES,
    Warpgroup,
    matrix_memory,
    pad_to_tiles,
    spread,
)
from jaxlm.ops.attention.spec import AttentionSpec, Tokens

MAX_QUERIES = 8
MULTIPROCESSORS = 132
# Two programs share a multiprocessor: one computes while the other waits. 4 KiB are for
# what the compiler adds.
MAX_SHARED_BYTES = SHARED_BYTES // 2 - 4096
MAX_SLOTS = 4


def best_splits(shape: tuple[int, ...], num_queries: int) -> int:
    """Returns enough splits to fill every multiprocessor, of at least four blocks each.

    Args:
      shape: the shape of the keys, [B, S, K, H].
      num_queries: T * N.
    """
    B, S, K, _ = shape
    programs = B * K * -(-num_queries // K // ROWS)
    enough = -(-2 * MULTIPROCESSORS // programs)
    return max(min(enough, S // (4 * GpuSettings().decode_block_keys)), 1)


def forward(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    settings: GpuSettings,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Computes attention and the log-sum-exp of the scores; see `flash.FlashKernels`.

    k and v have q's dtype, or are int8 with the spec's scales. S is arbitrary, but the
    cache is copied if S is not a multiple of 8.

    Returns:
      z in q's dtype, and the log-sum-exp, f32. For a query that sees no key, they are
      zeros, and -1e30 or the sink.
    """
    operands = _operands(q, k, v, spec, settings.decode_block_keys)
    B, K, padded, H = operands["q"].shape
    T, R, blocks = q.shape[1], q.shape[1] * q.shape[2] // K, padded // ROWS
    splits = settings.decode_splits or best_splits(k.shape, T * q.shape[2])
    program = _DecodeProgram(spec, k.shape[1], settings, splits, R, tuple(operands))
    shape = (B, K, splits, blocks * program.rows)
    kernel = program.warpgroup.kernel(
        program.run,
        soft_cap=spec.soft_cap,
        out_type=(
            jax.ShapeDtypeStruct((*shape, H), q.dtype),
            jax.ShapeDtypeStruct((*shape, H), q.dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=program.scratch(H, q.dtype, k.dtype),
        grid=(blocks, splits, K, B),
        grid_names=("block", "split", "head", "row"),
    )
    high, low, lse = (x[:, :, :, :R] for x in kernel(*operands.values()))
    z, lse = _merge(high.astype(jnp.float32) + low.astype(jnp.float32), lse, spec, T)
    return z.astype(q.dtype), lse


def _operands(q, k, v, spec: AttentionSpec, block_keys: int) -> dict[str, Array]:
    """Returns the kernel's inputs by name, with rows padded to a multiple of `ROWS`."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    missing = -T * G % ROWS

    def by_row(x):
        """Repeats one value per query for its rows: [B or 1, T] -> [B, R], padded."""
        x = jnp.repeat(x.astype(jnp.int32), G, axis=1)
        return jnp.pad(jnp.broadcast_to(x, (B, T * G)), ((0, 0), (0, missing)))

    def by_key(x):
        """Makes the keys of a head contiguous, for copies: [B, S, K] -> [B, K, S]."""
        return pad_to_tiles(x.astype(jnp.float32).swapaxes(1, 2), 2)

    q_rows = q.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
    mask = spec.mask
    table = make_table(mask, Grid(T, S, T, block_keys))
    operands = {
        "q": jnp.pad(q_rows, ((0, 0), (0, 0), (0, missing), (0, 0))),
        "k": pad_to_tiles(k, 1),
        "v": pad_to_tiles(v, 1),
        "query_positions": by_row(mask.queries(T).positions),
        "first": table.first_key,
        "end": table.end_key,
    }
    if mask.query_segments is not None:
        operands["query_segments"] = by_row(mask.query_segments)
        segments = jnp.broadcast_to(mask.key_segments.astype(jnp.int32), (B, S))
        operands["key_segments"] = pad_to_tiles(segments, 1)
    if spec.key_scale is not None:
        operands["key_scale"] = by_key(spec.key_scale)
        operands["value_scale"] = by_key(spec.value_scale)
    return operands


def _merge(
    z: Float[Array, "B K P R H"],
    lse: Float[Array, "B K P R"],
    spec: AttentionSpec,
    T: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Merges the results of the splits, weighted by their sums of exponentials."""
    B, K, _, R, H = z.shape
    G = R // T
    m = jnp.max(lse, axis=2)
    weight = jnp.exp(lse - m[:, :, None])
    sink = None
    if spec.sinks is not None:
        sink = jnp.tile(spec.sinks.astype(jnp.float32).reshape(K, G), (1, T))
    factor, lse = online_softmax.finish(m, jnp.sum(weight, axis=2), sink)
    # Elementwise, because tensor cores would round f32.
    z = jnp.sum(z * weight[..., None], axis=2) * factor[..., None]
    z = z.reshape(B, K, T, G, H).swapaxes(1, 2).reshape(B, T, K * G, H)
    return z, lse.reshape(B, K, T, G).swapaxes(2, 3).reshape(B, K * G, T)


@dataclass(frozen=True)
class _DecodeProgram:
    """One program: a block of the rows of a key head, over one split of its keys."""

    spec: AttentionSpec
    num_keys: int
    settings: GpuSettings
    splits: int
    """Number of splits of a row's keys."""
    queries: int
    """Number of rows that are queries; the rows after them are padding."""
    names: tuple[str, ...]
    """Names of the operands."""

    @property
    def warpgroup(self) -> Warpgroup:
        return Warpgroup(self.settings.interpret)

    @property
    def rows(self) -> int:
        """Number of rows of a block that are written."""
        return min(self.queries + -self.queries % 8, ROWS)

    @property
    def segments(self) -> bool:
        return self.spec.mask.query_segments is not None

    @property
    def int8(self) -> bool:
        return self.spec.key_scale is not None

    def scratch(self, H: int, dtype: Any, cache_dtype: Any) -> dict[str, Any]:
        """Returns shared memory and barriers by name."""
        keys, size = self.settings.decode_block_keys, jnp.dtype(cache_dtype).itemsize
        one_slot = 2 * keys * H * size
        rest = (ROWS + self.int8 * keys) * H * dtype.itemsize
        slots = max(2, min((MAX_SHARED_BYTES - rest) // one_slot, MAX_SLOTS))
        scratch = {
            "q": matrix_memory((ROWS, H), dtype),
            "k": matrix_memory((slots, keys, H), cache_dtype),
            "v": matrix_memory((slots, keys, H), cache_dtype),
            "query_positions": plgpu.SMEM((ROWS,), jnp.int32),
            "lse": plgpu.SMEM((ROWS,), jnp.float32),
            "q_ready": plgpu.Barrier(num_arrivals=2 + self.segments),
            "k_ready": plgpu.Barrier(
                num_arrivals=1 + self.segments + self.int8, num_barriers=slots
            ),
            "v_ready": plgpu.Barrier(num_arrivals=1 + self.int8, num_barriers=slots),
        }
        if self.segments:
            scratch["query_segments"] = plgpu.SMEM((ROWS,), jnp.int32)
            scratch["key_segments"] = plgpu.SMEM((slots, keys), jnp.int32)
        if self.int8:
            scratch["key_scale"] = plgpu.SMEM((slots, keys), jnp.float32)
            scratch["value_scale"] = plgpu.SMEM((slots, keys), jnp.float32)
            scratch["wide"] = matrix_memory((keys, H), dtype)
        return scratch

    def run(self, *operands: Any, **memory: Any) -> None:
        """Copies and computes in one warpgroup; other programs hide its latency."""
        refs = dict(zip(self.names, operands[:-3], strict=True))
        outs = operands[-3:]
        block, split = lax.axis_index("block"), lax.axis_index("split")
        head, row = lax.axis_index("head"), lax.axis_index("row")
        warpgroup, H = self.warpgroup, memory["q"].shape[-1]
        rows = pl.ds(block * ROWS, ROWS)
        ready = memory["q_ready"]
        plgpu.copy_gmem_to_smem(refs["q"].at[row, head, rows], memory["q"], ready)
        for name in ("query_positions", "query_segments")[: 1 + self.segments]:
            plgpu.copy_gmem_to_smem(refs[name].at[row, rows], memory[name], ready)

        first, count = self._split_blocks(refs, row, split)
        slots = memory["k"].shape[0]
        fetch = partial(self._fetch, refs, memory, row, head, first)
        for slot in range(slots):
            pl.when(slot < count)(partial(fetch, slot, slot))
        plgpu.barrier_wait(ready)

        def step(index, carry):
            slot = lax.rem(index, jnp.int32(slots))
            start = (first + index) * self.settings.decode_block_keys
            carry = self._step(memory, slot, start, carry)
            if self.segments or self.int8:
                # Wait for all threads to read the slot before it is overwritten.
                plgpu.commit_smem()
            pl.when(index + slots < count)(partial(fetch, index + slots, slot))
            return carry

        init = warpgroup.softmax_start(ROWS, H)
        m, l, acc = lax.fori_loop(0, count, step, init)
        factor, row_lse = online_softmax.finish(m, l)
        acc = acc * spread(factor, acc.shape, 0)
        # There is no shared memory for f32. Write it as two 16-bit numbers, a rounded
        # value and its remainder, into the buffers of the queries and of the values.
        high = memory["q"]
        low = memory["wide"] if self.int8 else memory["v"].at[0]
        low = low.at[pl.ds(0, ROWS)]
        rounded = acc.astype(high.dtype)
        high[...] = rounded
        low[...] = (acc - rounded.astype(jnp.float32)).astype(low.dtype)
        memory["lse"][...] = row_lse
        plgpu.commit_smem()
        target = pl.ds(block * self.rows, self.rows)
        for source, out in zip((high, low, memory["lse"]), outs, strict=True):
            source = source.at[pl.ds(0, self.rows)]
            plgpu.copy_smem_to_gmem(source, out.at[row, head, split, target])
        plgpu.wait_smem_to_gmem(0)

    def _split_blocks(self, refs, row, split):
        """Returns the first key block of a split, and the number of its key blocks."""
        # A single row is for the whole batch.
        at = row if refs["first"].shape[0] > 1 else 0
        first, end = refs["first"][at], refs["end"][at]
        splits = jnp.int32(self.splits)
        share = lax.div(end - first + splits - 1, splits)
        start = first + split * share
        count = jnp.minimum(start + share, end) - start
        return start, jnp.maximum(count, 0)

    def _fetch(self, refs, memory, row, head, first, index, slot):
        """Starts copying a block of keys and values, with their segments and scales."""
        size = self.settings.decode_block_keys
        keys = pl.ds((first + index) * size, size)

        def copy(name, source, ready):
            target = memory[name].at[slot]
            plgpu.copy_gmem_to_smem(source, target, memory[ready].at[slot])

        copy("k", refs["k"].at[row, keys, head], "k_ready")
        if self.segments:
            copy("key_segments", refs["key_segments"].at[row, keys], "k_ready")
        if self.int8:
            copy("key_scale", refs["key_scale"].at[row, head, keys], "k_ready")
        copy("v", refs["v"].at[row, keys, head], "v_ready")
        if self.int8:
            copy("value_scale", refs["value_scale"].at[row, head, keys], "v_ready")

    def _step(self, memory, slot, start, carry):
        """One step of the online softmax: the block of keys that starts at `start`."""
        m, l, acc = carry
        warpgroup, spec = self.warpgroup, self.spec
        plgpu.barrier_wait(memory["k_ready"].at[slot])
        raw = warpgroup.dot(memory["q"], self._matrix(memory, "k", slot))
        shape = raw.shape

        def columns(name):
            return warpgroup.load(memory[name].at[slot], shape, 1)

        def rows(name):
            return warpgroup.load(memory[name], shape, 0)

        if self.int8:
            raw = raw * columns("key_scale")
        positions, segments = rows("query_positions"), self.segments
        queries = Tokens(positions, rows("query_segments") if segments else None)
        positions = warpgroup.iota(start, shape, 1)
        keys = Tokens(positions, columns("key_segments") if segments else None)
        allowed = spec.mask.allowed(queries, keys, self.num_keys)
        scores = online_softmax.scores(raw, spec.scale, spec.soft_cap)
        scores = online_softmax.hide(scores, allowed)
        m_new = jnp.maximum(m, jnp.max(scores, axis=1))
        alpha = jnp.exp(m - m_new)
        p = jnp.exp(scores - spread(m_new, shape, 0))
        l = l * alpha + jnp.sum(p, axis=1)
        acc = acc * spread(alpha, acc.shape, 0)
        plgpu.barrier_wait(memory["v_ready"].at[slot])
        if self.int8:
            p = p * columns("value_scale")
        acc = warpgroup.accumulate(acc, p, self._matrix(memory, "v", slot))
        return m_new, l, acc

    def _matrix(self, memory, name, slot):
        """Returns the keys or values of a slot, cast to 16 bits if they are int8."""
        if not self.int8:
            return memory[name].at[slot]
        self.warpgroup.widen(memory[name].at[slot], memory["wide"])
        return memory["wide"]
