"""GPU kernels with one resident block per warpgroup, and a stream of blocks to visit.

Shared by the plain forward kernel and all backward kernels. A plain program is one
warpgroup and owns one block of queries or keys. It streams blocks of the other side:
the next ones are copied to shared memory while it computes with the current one.
A specialized program (`specialized_backward.py`) has several consumer warpgroups with a
block each, and a producer that copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.block_skipping import BlockTable, Extent, Grid, make_table
from jaxlm.ops.attention.gpu.warpgroup import (
    Warpgroup,
    mask_operands,
    matrix_memory,
    pad_to_tiles,
)
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Tokens

# An output is written through the shared memory of the operand of its shape.
OUTPUT_BUFFER = {"z": "q", "dq": "q", "dk": "k", "dv": "v"}


@dataclass(frozen=True)
class Side:
    """The queries' or the keys' side of a kernel: what it keeps in shared memory."""

    name: str
    """query or key."""
    block: int
    matrices: tuple[str, ...]
    """Operands [B, rows, heads, H]."""
    floats: tuple[str, ...] = ()
    """Operands [B, heads, rows], f32."""
    buffers: int = 0
    """Number of blocks in shared memory; 0: this side is resident, with one block."""

    def memory(self, operands: dict[str, Any], H: int, dtype: Any) -> dict[str, Any]:
        """Returns shared memory by name, and a barrier for when it is filled."""
        slots = (self.buffers,) if self.buffers else ()
        memory = {
            name: matrix_memory((*slots, self.block, H), dtype)
            for name in self.matrices
        }
        for name in self.floats:
            memory[name] = plgpu.SMEM((*slots, self.block), jnp.float32)
        for name in self.integers(operands):
            memory[name] = plgpu.SMEM((*slots, self.block), jnp.int32)
        memory[self.ready] = plgpu.Barrier(
            num_arrivals=len(memory), num_barriers=max(self.buffers, 1)
        )
        return memory

    def integers(self, operands: dict[str, Any]) -> list[str]:
        """Returns the names of this side's mask operands [B, rows] that exist."""
        names = (f"{self.name}_positions", f"{self.name}_segments")
        return [name for name in names if name in operands]

    @property
    def ready(self) -> str:
        return f"{self.name}_ready"


@dataclass(frozen=True)
class StreamingKernel:
    """The static description of a kernel."""

    spec: AttentionSpec
    grid: Grid
    group: int
    """Query heads per key head."""
    resident: Side
    streamed: Side
    interpret: bool
    consumers: int = 0
    """Warpgroups of a program that compute, beside one that copies; 0: it is plain."""

    @property
    def rows(self) -> int:
        """Rows of the resident side, padded to whole programs."""
        return self._programs * max(self.consumers, 1) * self.resident.block

    @property
    def blocks(self) -> int:
        """Number of blocks of the resident side."""
        grid, queries = self.grid, self.resident.name == "query"
        return grid.query_blocks if queries else grid.key_blocks

    @property
    def _programs(self) -> int:
        """Number of programs of one head; each has a block for every consumer."""
        return -(-self.blocks // max(self.consumers, 1))

    def launch(
        self,
        program: Callable[["Program"], None],
        matrices: dict[str, Array],
        floats: dict[str, Array],
        outputs: dict[str, jax.ShapeDtypeStruct],
    ) -> dict[str, Array]:
        """Runs one program per (head, block, batch row), and returns the outputs.

        A specialized program gets its index as its block.

        Args:
          matrices: q, k, v and dz, [B, rows, heads, H].
          floats: f32 [B, heads, rows], padded to whole blocks; sinks [heads].
          outputs: shapes and dtypes of the outputs, with `rows` rows.
        """
        q = matrices["q"]
        operands: dict[str, Any] = {
            name: pad_to_tiles(x, 1) for name, x in matrices.items()
        }
        operands |= floats | mask_operands(self.spec.mask, q.shape[0])
        operands["table"] = make_table(self.spec.mask, self.grid)
        memory = self.resident.memory(operands, q.shape[-1], q.dtype)
        memory |= self.streamed.memory(operands, q.shape[-1], q.dtype)
        if self.consumers:
            memory["free"] = plgpu.Barrier(
                num_arrivals=self.consumers, num_barriers=self.streamed.buffers
            )
        if "lse" in outputs:
            memory["lse"] = plgpu.SMEM((self.resident.block,), jnp.float32)
        trees = (operands, outputs, memory)
        leaves, shapes = zip(*(jax.tree.flatten(x) for x in trees), strict=True)

        def body(*refs):
            refs = iter(refs)
            groups = [[next(refs) for _ in part] for part in leaves]
            indices = map(lax.axis_index, ("head", "block", "row"))
            program(Program(self, *map(jax.tree.unflatten, shapes, groups), *indices))

        # The name shown in profiles.
        body.__name__ = program.__name__.strip("_")
        arrays, types, scratch = leaves
        heads = matrices[self.resident.matrices[0]].shape[2]
        sizes = {"head": heads, "block": self._programs, "row": q.shape[0]}
        threads: dict[str, Any] = {}
        if self.consumers:
            # The last varies fastest: the longest programs of all heads come first, so
            # that those that end last are short.
            sizes = {name: sizes[name] for name in ("block", "head", "row")}
            threads = {"num_threads": self.consumers + 1, "thread_name": "warpgroup"}
        results = Warpgroup(self.interpret).kernel(
            body,
            soft_cap=self.spec.soft_cap,
            out_type=types,
            scratch_types=scratch,
            grid=tuple(sizes.values()),
            grid_names=tuple(sizes),
            **threads,
        )(*arrays)
        return jax.tree.unflatten(shapes[1], results)


@dataclass(frozen=True)
class Program:
    """A program inside a kernel: its references, its indices, and what it can do."""

    kernel: StreamingKernel
    ins: dict[str, Any]
    out: dict[str, Any]
    memory: dict[str, Any]
    head: Any
    block: Any
    row: Any
    """Of the batch."""
    slot: Any = None
    """Of the resident block, if there are several."""

    @property
    def warpgroup(self) -> Warpgroup:
        return Warpgroup(self.kernel.interpret)

    @property
    def table(self) -> BlockTable:
        return self.ins["table"]

    def extent(self, side: Side, block: Any) -> Extent:
        """Returns the range of positions and segments of a block."""
        keys = side.name == "key"
        read = self.table.key_extent if keys else self.table.query_extent
        return read(self.row, block)

    def visibility(self, extent: Extent, other: Any) -> tuple[Any, Any]:
        """Returns whether any score with a streamed block is visible, and whether all.

        Args:
          extent: of the resident block.
          other: the index of the streamed block.
        """
        pair = (extent, self.extent(self.kernel.streamed, other))
        if self.kernel.resident.name == "key":
            pair = pair[::-1]
        return self.table.visibility(*pair)

    def tile(self, name: str, slot: Any) -> Any:
        """Returns a matrix or vector in shared memory; `slot` None if it has none."""
        return self.memory[name] if slot is None else self.memory[name].at[slot]

    def zeros(self, name: str) -> Any:
        """Returns f32 zeros in the shape of this program's block of an output."""
        shape = self.tile(OUTPUT_BUFFER[name], self.slot).shape
        return self.warpgroup.full(shape, 0.0)

    def fetch(self, side: Side, slot: Any, block: Any, head: Any) -> None:
        """Starts copying a block into shared memory."""
        rows = pl.ds(block * side.block, side.block)

        def copy(name, *source):
            plgpu.copy_gmem_to_smem(
                self.ins[name].at[source],
                self.tile(name, slot),
                self.tile(side.ready, slot),
            )

        for name in side.matrices:
            copy(name, self.row, rows, head)
        for name in side.floats:
            copy(name, self.row, head, rows)
        for name in side.integers(self.ins):
            copy(name, self.row, rows)

    def _visited(self) -> tuple[Any, Callable]:
        """Returns the number of streamed blocks, and a map of index to (block, head).

        A block of keys visits the queries of all heads that share its key head.
        """
        group = self.kernel.group
        if self.kernel.resident.name == "query":
            first, end = self.table.key_range(self.row, self.block)
            key_head = lax.div(self.head, jnp.int32(group))
            return end - first, lambda index: (first + index, key_head)
        first, end = self.table.query_range(self.row, self.block)

        def locate(index):
            n = self.head * group + lax.div(index, end - first)
            return first + lax.rem(index, end - first), n

        return (end - first) * group, locate

    def stream(self, step: Callable, carry: Any) -> Any:
        """Loops over streamed blocks: carry = step(block, slot, all_visible, carry).

        At each step the resident block is in shared memory, and so is the streamed one,
        in the slot. Skips completely hidden pairs. Returns the last carry.
        """
        resident, streamed = self.kernel.resident, self.kernel.streamed
        count, locate = self._visited()
        extent = self.extent(resident, self.block)
        self.fetch(resident, None, self.block, self.head)
        for index in range(streamed.buffers):
            at = jnp.int32(index)
            pl.when(at < count)(lambda at=at: self.fetch(streamed, at, *locate(at)))
        plgpu.barrier_wait(self.tile(resident.ready, None))

        def body(index, carry):
            slot = lax.rem(index, jnp.int32(streamed.buffers))
            plgpu.barrier_wait(self.tile(streamed.ready, slot))
            block, _ = locate(index)
            any_visible, all_visible = self.visibility(extent, block)
            visit = partial(step, block, slot, all_visible)
            carry = lax.cond(any_visible, visit, lambda carry: carry, carry)
            # Wait for all warps to read the slot before it is overwritten.
            plgpu.commit_smem()
            later = index + streamed.buffers
            pl.when(later < count)(lambda: self.fetch(streamed, slot, *locate(later)))
            return carry

        return lax.fori_loop(0, count, body, carry)

    def scores(self, raw: Any, all_visible: Any, other: Any, slot: Any, axis: int):
        """Returns the scores of the resident block and block `other`, in base 2.

        Args:
          raw: q k^T, or k q^T: queries lie along `axis`.
          all_visible: whether no score is hidden.
          slot: the slot of the other block.
        """
        spec = self.kernel.spec
        scores = online_softmax.scores_base_2(raw, spec.scale, spec.soft_cap)
        return self._hide(scores, MASKED, all_visible, other, slot, axis)

    def probs(self, raw: Any, all_visible: Any, other: Any, slot: Any, axis: int):
        """Recomputes the probabilities, from the log-sum-exp; arguments as `scores`."""
        spec = self.kernel.spec
        scores = online_softmax.scores_base_2(raw, spec.scale, spec.soft_cap)
        p = jnp.exp2(scores - self._of_queries("lse", raw.shape, slot, axis))
        # Not the scores, so that their scale and the subtraction are one instruction.
        return self._hide(p, 0.0, all_visible, other, slot, axis)

    def dscores(self, raw: Any, p: Any, dp: Any, slot: Any, axis: int):
        """Computes the gradient of `raw`, without the scale, which comes at the end.

        Args:
          p: the probabilities.
          dp: their gradient.
        """
        spec = self.kernel.spec
        capped = online_softmax.scores(raw, spec.scale, spec.soft_cap)
        slope = online_softmax.slope(capped, 1.0, spec.soft_cap)
        delta = self._of_queries("delta", raw.shape, slot, axis)
        return online_softmax.dscores(p, dp, delta, slope)

    def _of_queries(self, name: str, shape: tuple[int, int], slot: Any, axis: int):
        """Loads a vector of the queries, which lie along `axis` of a matrix."""
        # Queries along axis 1 are the streamed side.
        vector = self.tile(name, slot if axis == 1 else self.slot)
        return self.warpgroup.load(vector, shape, axis)

    def _hide(self, x: Any, value: float, all_visible: Any, other, slot, axis: int):
        """Sets hidden elements to a value; other arguments as `scores`."""

        def hide(x):
            resident = self._tokens(
                self.kernel.resident, self.block, self.slot, x.shape, 0
            )
            streamed = self._tokens(self.kernel.streamed, other, slot, x.shape, 1)
            pair = (resident, streamed) if axis == 0 else (streamed, resident)
            allowed = self.kernel.spec.mask.allowed(*pair, self.kernel.grid.num_keys)
            return x if allowed is None else jnp.where(allowed, x, value)

        return lax.cond(all_visible, lambda x: x, hide, x)

    def _tokens(self, side: Side, block: Any, slot: Any, shape: tuple, axis: int):
        """Returns the positions and segments of a block, broadcast to the scores."""

        def load(name):
            if name not in self.memory:
                return None
            return self.warpgroup.load(self.tile(name, slot), shape, axis)

        positions = load(f"{side.name}_positions")
        if positions is None:
            positions = self.warpgroup.iota(block * side.block, shape, axis)
        return Tokens(positions, load(f"{side.name}_segments"))

    def store(self, outputs: dict[str, Any], lse: Any = None) -> None:
        """Writes this program's block of the outputs, and waits for the copies."""
        rows = pl.ds(
            self.block * self.kernel.resident.block, self.kernel.resident.block
        )
        copies = []
        for name, x in outputs.items():
            buffer = self.tile(OUTPUT_BUFFER[name], self.slot)
            buffer[...] = x.astype(buffer.dtype)
            copies.append((buffer, self.out[name].at[self.row, rows, self.head]))
        if lse is not None:
            buffer = self.memory["lse"]
            buffer[...] = lse
            copies.append((buffer, self.out["lse"].at[self.row, self.head, rows]))
        plgpu.commit_smem()
        for buffer, target in copies:
            plgpu.copy_smem_to_gmem(buffer, target)
        plgpu.wait_smem_to_gmem(0)
