"""Warp-specialized backward kernels of flash attention, for Hopper.

After FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), in Pallas Mosaic GPU. Each
of two consumer warpgroups owns `ROWS` queries (dq) or keys (dk and dv), and both
read the same streamed blocks. A producer warpgroup only starts copies, several blocks
ahead. While a consumer computes probabilities, the tensor cores multiply for it and for
the other: it waits for a product only where it needs the result. The sums of the
gradients stay in registers, in a fixed order, so results are deterministic.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.block_skipping import Grid
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings
from jaxlm.ops.attention.gpu.streaming import Program, Side, StreamingKernel
from jaxlm.ops.attention.gpu.warpgroup import CONSUMERS, ROWS
from jaxlm.ops.attention.spec import MASKED, AttentionSpec

# With wider heads, the sums do not fit in the registers of a consumer.
MAX_HEAD_DIM = 128


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
    queries = Side("query", ROWS, ("q", "dz"), ("lse", "delta"))
    keys = Side("key", ROWS, ("k", "v"))
    block_queries = settings.backward_block_queries
    block_keys = settings.backward_block_keys
    buffers = settings.backward_buffers
    for_queries = StreamingKernel(
        spec,
        Grid(T, S, ROWS, block_keys),
        group=N // K,
        resident=replace(queries, buffers=CONSUMERS),
        streamed=replace(keys, block=block_keys, buffers=buffers),
        interpret=settings.interpret,
        consumers=CONSUMERS,
    )
    for_keys = replace(
        for_queries,
        grid=Grid(T, S, block_queries, ROWS),
        resident=replace(keys, buffers=CONSUMERS),
        streamed=replace(queries, block=block_queries, buffers=buffers),
    )
    rows = max(for_queries.rows, for_keys.grid.query_blocks * block_queries)
    beyond = [(0, 0), (0, 0), (0, rows - T)]
    floats = {
        # A huge log-sum-exp makes the probabilities of padding queries 0.
        "lse": jnp.pad(lse, beyond, constant_values=-MASKED) * online_softmax.LOG2_E,
        "delta": jnp.pad(delta, beyond),
    }
    matrices = {"q": q, "k": k, "v": v, "dz": dz}
    like_q = jax.ShapeDtypeStruct((B, for_queries.rows, N, H), q.dtype)
    like_k = jax.ShapeDtypeStruct((B, for_keys.rows, K, H), k.dtype)
    dkv = for_keys.launch(_key_program, matrices, floats, {"dk": like_k, "dv": like_k})
    if settings.interpret:
        # Threads of two kernels at once can wait for one another in the interpreter.
        matrices, dkv = lax.optimization_barrier((matrices, dkv))
    dq = for_queries.launch(_query_program, matrices, floats, {"dq": like_q})["dq"]
    return dq[:, :T], dkv["dk"][:, :S], dkv["dv"][:, :S]


def _query_program(run: Program) -> None:
    """Computes dq of one block of queries of one head for each consumer."""

    def add(run, j, slot, all_visible, dq):
        q, dz = run.tile("q", run.slot), run.tile("dz", run.slot)
        k, v = run.tile("k", slot), run.tile("v", slot)
        warpgroup, shape = run.warpgroup, (q.shape[0], k.shape[0])

        def multiply(sums):
            raw, dp, dq = sums
            warpgroup.add(raw, q, k, transposed=True)
            warpgroup.add(dp, dz, v, transposed=True)
            scores = warpgroup.read(raw, 1)
            p = run.probs(scores, all_visible, j, slot, 0)
            ds = run.dscores(scores, p, warpgroup.read(dp, 0), slot, 0)
            warpgroup.add(dq, ds.astype(k.dtype), k)

        zeros = warpgroup.full(shape, 0.0)
        return warpgroup.pipeline(multiply, [zeros, zeros, dq])[2]

    def consume(run, loop):
        dq = loop(add, run.zeros("dq"))
        run.store({"dq": dq * run.kernel.spec.scale})

    _specialize(run, consume)


def _key_program(run: Program) -> None:
    """Computes dk and dv of one block of keys of one key head for each consumer.

    Sums over the queries, and over the query heads that share the key head. Scores are
    [keys, queries].
    """

    def add(run, i, slot, all_visible, sums):
        k, v = run.tile("k", run.slot), run.tile("v", run.slot)
        q, dz = run.tile("q", slot), run.tile("dz", slot)
        warpgroup, shape = run.warpgroup, (k.shape[0], q.shape[0])

        def multiply(sums):
            raw, dp, dk, dv = sums
            warpgroup.add(raw, k, q, transposed=True)
            warpgroup.add(dp, v, dz, transposed=True)
            scores = warpgroup.read(raw, 1)
            p = run.probs(scores, all_visible, i, slot, 1)
            warpgroup.add(dv, p.astype(dz.dtype), dz)
            ds = run.dscores(scores, p, warpgroup.read(dp, 1), slot, 1)
            warpgroup.add(dk, ds.astype(q.dtype), q)

        zeros = warpgroup.full(shape, 0.0)
        return tuple(warpgroup.pipeline(multiply, [zeros, zeros, *sums])[2:])

    def consume(run, loop):
        dk, dv = loop(add, (run.zeros("dk"), run.zeros("dv")))
        run.store({"dk": dk * run.kernel.spec.scale, "dv": dv})

    _specialize(run, consume)


def _specialize(run: Program, consume: Callable) -> None:
    """Gives each warpgroup its role: the consumers, and after them the producer.

    Args:
      consume: gets the consumer's `Program`, and a function (step, carry) -> carry that
        runs carry = step(program, block, slot, all_visible, carry) for each streamed
        block that the consumer sees.
    """
    kernel = run.kernel
    if kernel.resident.name == "query":
        # As for keys, the first have the most to visit under a causal mask.
        programs = kernel.rows // (CONSUMERS * kernel.resident.block)
        run = replace(run, block=programs - 1 - run.block)
    stream = _Stream(run)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own = replace(run, block=run.block * CONSUMERS + warpgroup, slot=warpgroup)
        own.fetch(kernel.resident, own.slot, own.block, run.head)
        plgpu.barrier_wait(own.tile(kernel.resident.ready, own.slot))
        consume(own, partial(stream.loop, own))

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        stream.produce()


class _Stream:
    """The streamed blocks that the consumers of a program visit, and their slots.

    They are the blocks from the first to the last that any consumer sees, of each head.
    """

    def __init__(self, run: Program):
        self.run = run
        self._queries = run.kernel.resident.name == "query"
        first, end = self._range(run.block * CONSUMERS)
        for i in range(1, CONSUMERS):
            other_first, other_end = self._range(run.block * CONSUMERS + i)
            # An empty range does not count.
            first = jnp.where(end > first, jnp.minimum(first, other_first), other_first)
            end = jnp.maximum(end, other_end)
        self.first, self.end = first, jnp.maximum(first, end)
        self.count = self.end - self.first
        self._heads = 1 if self._queries else run.kernel.group

    def _range(self, block: Any) -> tuple[Any, Any]:
        """Returns the first streamed block that a resident block sees, and the end."""
        kernel, table = self.run.kernel, self.run.table
        read = table.key_range if self._queries else table.query_range
        # The last program may have fewer blocks than consumers.
        first, end = read(self.run.row, jnp.minimum(block, kernel.blocks - 1))
        return first, jnp.where(block < kernel.blocks, end, first)

    def _slot(self, index: Any) -> Any:
        return lax.rem(index, jnp.int32(self.run.kernel.streamed.buffers))

    def _fetch(self, index: Any) -> None:
        """Starts copying the block of an index into its slot."""
        run, group = self.run, jnp.int32(self.run.kernel.group)
        if self._queries:
            block, head = self.first + index, lax.div(run.head, group)
        else:
            block = self.first + lax.rem(index, self.count)
            head = run.head * group + lax.div(index, self.count)
        run.fetch(run.kernel.streamed, self._slot(index), block, head)

    def _wait_free(self, index: Any) -> None:
        """Waits until all consumers have left the slot of an index."""
        plgpu.barrier_wait(self.run.tile("free", self._slot(index)))

    def produce(self) -> None:
        """Copies all blocks, each into its slot once the consumers have left it."""
        slots, total = self.run.kernel.streamed.buffers, self.count * self._heads
        for index in map(jnp.int32, range(slots)):
            pl.when(index < total)(partial(self._fetch, index))

        @pl.loop(slots, jnp.maximum(total, slots))
        def _(index):
            self._wait_free(index)
            self._fetch(index)

        # Every phase of a barrier must have been waited for.
        for index in map(jnp.int32, range(slots)):
            pl.when(index < total)(partial(self._wait_free, index))

    def loop(self, own: Program, step: Callable, carry: Any) -> Any:
        """Runs the step of a consumer; see `_specialize`."""
        kernel = own.kernel
        streamed = kernel.streamed
        extent = own.extent(kernel.resident, jnp.minimum(own.block, kernel.blocks - 1))
        first, end = self._range(own.block)
        first = jnp.clip(first, self.first, self.end)
        end = jnp.clip(end, first, self.end)

        def of_head(g, carry):
            def visit(block, carry, seen=True):
                slot = self._slot(g * self.count + block - self.first)
                if seen:
                    # Read from memory before there is something to wait for.
                    _, all_visible = own.visibility(extent, block)
                plgpu.barrier_wait(own.tile(streamed.ready, slot))
                if seen:
                    carry = step(own, block, slot, all_visible, carry)
                    if streamed.floats or streamed.integers(own.ins):
                        # Threads, not tensor cores, have read these: wait for them
                        # before the copy engine overwrites the slot.
                        plgpu.commit_smem()
                plgpu.barrier_arrive(own.tile("free", slot))
                return carry

            skip = partial(visit, seen=False)
            lax.fori_loop(self.first, first, skip, None)
            carry = lax.fori_loop(first, end, visit, carry)
            lax.fori_loop(end, self.end, skip, None)
            return carry

        if self._heads == 1:
            return of_head(jnp.int32(0), carry)
        return lax.fori_loop(0, self._heads, of_head, carry)
