"""Warp-specialized forward kernel of flash attention, for Hopper.

After FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), in Pallas Mosaic GPU: a
producer warpgroup only starts copies of keys and values, several blocks ahead. Two
consumer warpgroups take turns on the tensor cores (ping-pong), so that the softmax of
one overlaps with the dot products of the other. Completely hidden blocks are not read,
and completely visible blocks are not masked.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.block_skipping import BlockTable, Grid, make_table
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.gpu.warpgroup import (
    CONSUMERS,
    ROWS,
    Warpgroup,
    mask_operands,
    matrix_memory,
    pad_to_tiles,
    spread,
)
from jaxlm.ops.attention.spec import AttentionSpec, Tokens

BLOCK_QUERIES = CONSUMERS * ROWS


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    settings: GpuSettings,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Computes attention and the log-sum-exp of the scores; see `flash.FlashKernels`.

    Returns:
      z in q's dtype, and the log-sum-exp, f32. For a query that sees no key, they are
      zeros, and -1e30 or the sink.
    """
    B, T, N, H = q.shape
    grid = Grid(T, k.shape[1], BLOCK_QUERIES, settings.block_keys)
    program = _SpecializedProgram(spec, grid, settings, N // k.shape[2])
    operands = program.operands(q, k, v)
    tree = jax.tree.structure(operands)
    # A copy past the end of z writes only what is inside; the interpreter would write
    # nothing, so it gets whole blocks.
    rows = grid.query_blocks * BLOCK_QUERIES
    z_rows = rows if settings.interpret else T + -T % 8

    def body(*refs, **scratch):
        *inputs, z, lse = refs
        program.run(jax.tree.unflatten(tree, inputs), z, lse, scratch)

    kernel = program.warpgroup.kernel(
        body,
        soft_cap=spec.soft_cap,
        out_type=(
            jax.ShapeDtypeStruct((B, z_rows, N, H), q.dtype),
            jax.ShapeDtypeStruct((B, N, rows), jnp.float32),
        ),
        scratch_types=program.scratch(H, q.dtype),
        grid=(N, grid.query_blocks, B),
        grid_names=("head", "block", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
    )
    z, lse = kernel(*jax.tree.leaves(operands))
    return z[:, :T], lse[:, :, :T]


@dataclass(frozen=True)
class _SpecializedProgram:
    """One program: `BLOCK_QUERIES` queries of a head, over the keys that they see."""

    spec: AttentionSpec
    grid: Grid
    settings: GpuSettings
    group: int
    """Query heads per key head."""

    @property
    def warpgroup(self) -> Warpgroup:
        return Warpgroup(self.settings.interpret)

    def operands(self, q: Array, k: Array, v: Array) -> dict[str, Any]:
        """Returns the kernel's inputs by name."""
        operands: dict[str, Any] = {"q": q, "k": k, "v": v}
        operands = {name: pad_to_tiles(x, 1) for name, x in operands.items()}
        operands |= mask_operands(self.spec.mask, q.shape[0])
        # Only backward kernels need the query ranges.
        table = make_table(self.spec.mask, self.grid)
        operands["table"] = replace(table, first_query=None, end_query=None)
        if self.spec.sinks is not None:
            operands["sinks"] = self.spec.sinks.astype(jnp.float32)
        return operands

    def scratch(self, H: int, dtype: Any) -> dict[str, Any]:
        """Returns shared memory and barriers by name."""
        spec, slots, keys = self.spec, self.settings.buffers, self.settings.block_keys
        segments = spec.mask.query_segments is not None
        positions = spec.mask.query_positions is not None
        scratch = {
            "qz": matrix_memory((CONSUMERS, ROWS, H), dtype),
            "k": matrix_memory((slots, keys, H), dtype),
            "v": matrix_memory((slots, keys, H), dtype),
            "lse": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            "q_ready": plgpu.Barrier(
                num_arrivals=1 + segments + positions, num_barriers=CONSUMERS
            ),
            "k_ready": plgpu.Barrier(num_arrivals=1 + segments, num_barriers=slots),
            "v_ready": plgpu.Barrier(num_barriers=slots),
            "k_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
            "v_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
            "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
        }
        if positions:
            scratch["query_positions"] = plgpu.SMEM((CONSUMERS, ROWS), jnp.int32)
        if segments:
            scratch["query_segments"] = plgpu.SMEM((CONSUMERS, ROWS), jnp.int32)
            scratch["key_segments"] = plgpu.SMEM((slots, keys), jnp.int32)
        return scratch

    def run(self, refs: dict, z: Any, lse: Any, memory: dict) -> None:
        """Runs the producer or a consumer; all read the same range of key blocks."""
        head, row = lax.axis_index("head"), lax.axis_index("row")
        # Start with the blocks that have the most keys under a causal mask, so that the
        # programs that end last are short.
        block = self.grid.query_blocks - 1 - lax.axis_index("block")
        table = _KeyRange(refs["table"], row, block)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self._produce(
                refs, memory, table, row, lax.div(head, jnp.int32(self.group))
            )

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self._consume(refs, z, lse, memory, table, row, head, warpgroup)

    def _produce(self, refs, memory, table, row, head):
        """The producer: copies keys and values into slots as they become free."""
        slots, keys = self.settings.buffers, self.settings.block_keys

        def copy(step, slot, free):
            rows = pl.ds((table.first + step) * keys, keys)
            ready = memory["k_ready"].at[slot]
            if free:
                plgpu.barrier_wait(memory["k_free"].at[slot])
            plgpu.copy_gmem_to_smem(
                refs["k"].at[row, rows, head], memory["k"].at[slot], ready
            )
            if "key_segments" in memory:
                source = refs["key_segments"].at[row, rows]
                target = memory["key_segments"].at[slot]
                plgpu.copy_gmem_to_smem(source, target, ready)
            if free:
                plgpu.barrier_wait(memory["v_free"].at[slot])
            ready = memory["v_ready"].at[slot]
            plgpu.copy_gmem_to_smem(
                refs["v"].at[row, rows, head], memory["v"].at[slot], ready
            )

        for slot in range(slots):
            pl.when(slot < table.count)(partial(copy, slot, slot, False))

        @pl.loop(slots, jnp.maximum(table.count, slots))
        def _(step):
            copy(step, lax.rem(step, jnp.int32(slots)), True)

        # Every phase of a barrier must have been waited for.
        for slot in range(slots):

            @pl.when(slot < table.count)
            def _(slot=slot):
                plgpu.barrier_wait(memory["k_free"].at[slot])
                plgpu.barrier_wait(memory["v_free"].at[slot])

    def _consume(self, refs, z, lse, memory, table, row, head, consumer):
        """A consumer: computes attention of `ROWS` queries."""
        warpgroup, H = self.warpgroup, memory["qz"].shape[-1]
        start = table.block * BLOCK_QUERIES + consumer * ROWS
        rows = pl.ds(start, ROWS)
        qz, ready = memory["qz"].at[consumer], memory["q_ready"].at[consumer]
        plgpu.copy_gmem_to_smem(refs["q"].at[row, rows, head], qz, ready)
        for name in ("query_positions", "query_segments"):
            if name in memory:
                source, target = refs[name].at[row, rows], memory[name].at[consumer]
                plgpu.copy_gmem_to_smem(source, target, ready)
        plgpu.barrier_wait(ready)

        take_turn = partial(_take_turn, memory["turn"])
        # The second consumer is half a step behind the first.
        pl.when(consumer == 1)(take_turn)
        step = partial(self._step, memory, table, consumer, start, take_turn)
        init = warpgroup.softmax_start(ROWS, H)
        m, l, acc = lax.fori_loop(0, table.count, step, init)
        pl.when(consumer == 0)(take_turn)

        sink = refs["sinks"][head] if "sinks" in refs else None
        factor, row_lse = online_softmax.finish(m / online_softmax.LOG2_E, l, sink)
        qz[...] = (acc * spread(factor, acc.shape, 0)).astype(qz.dtype)
        memory["lse"].at[consumer][...] = row_lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(qz, z.at[row, rows, head])
        plgpu.copy_smem_to_gmem(memory["lse"].at[consumer], lse.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)

    def _step(self, memory, table, consumer, start, take_turn, step, carry):
        """One step of the online softmax, in base 2."""
        m, l, acc = carry
        slot = lax.rem(step, jnp.int32(self.settings.buffers))
        plgpu.barrier_wait(memory["k_ready"].at[slot])
        raw = self.warpgroup.dot(
            memory["qz"].at[consumer], memory["k"].at[slot], meanwhile=take_turn
        )
        shape = raw.shape
        spec = self.spec
        scores = online_softmax.scores_base_2(raw, spec.scale, spec.soft_cap)
        scores = lax.cond(
            table.all_visible(step),
            lambda x: x,
            lambda x: online_softmax.hide(
                x, self._allowed(memory, table, consumer, start, step, slot, shape)
            ),
            scores,
        )
        if "key_segments" in memory:
            # Threads, not tensor cores, have read these: wait for them before the copy
            # engine overwrites the slot.
            plgpu.commit_smem()
        plgpu.barrier_arrive(memory["k_free"].at[slot])

        m_new = jnp.maximum(m, jnp.max(scores, axis=1))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(scores - spread(m_new, shape, 0))
        l = l * alpha + jnp.sum(p, axis=1)
        acc = acc * spread(alpha, acc.shape, 0)
        plgpu.barrier_wait(memory["v_ready"].at[slot])
        take_turn()
        acc = self.warpgroup.accumulate(acc, p, memory["v"].at[slot])
        plgpu.barrier_arrive(memory["v_free"].at[slot])
        return m_new, l, acc

    def _allowed(self, memory, table, consumer, start, step, slot, shape):
        """`Mask.allowed` for a block of scores [ROWS, block_keys]."""
        warpgroup = self.warpgroup

        def load(name, index, axis):
            if name not in memory:
                return None
            return warpgroup.load(memory[name].at[index], shape, axis)

        positions = load("query_positions", consumer, 0)
        if positions is None:
            positions = warpgroup.iota(start, shape, 0)
        queries = Tokens(positions, load("query_segments", consumer, 0))
        first = (table.first + step) * self.settings.block_keys
        positions = warpgroup.iota(first, shape, 1)
        keys = Tokens(positions, load("key_segments", slot, 1))
        return self.spec.mask.allowed(queries, keys, self.grid.num_keys)


def _take_turn(turn: Any) -> None:
    """Gives the tensor cores to the other consumer, and waits to get them back."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


class _KeyRange:
    """The key blocks that one block of queries visits, read from the table."""

    def __init__(self, table: BlockTable, row, block):
        self._table, self._row, self.block = table, row, block
        self._queries = table.query_extent(row, block)
        self.first, end = table.key_range(row, block)
        self.count = end - self.first

    def all_visible(self, step):
        """Returns whether all scores with the key block of a step are visible."""
        keys = self._table.key_extent(self._row, self.first + step)
        return self._table.visibility(self._queries, keys)[1]
