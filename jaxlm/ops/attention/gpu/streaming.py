"""GPU programs of one warpgroup: one block stays, those that it meets stream by.

What the plain forward kernel and both backward kernels share. Each program owns one
block of queries or of keys; blocks of the other side are copied to shared memory while
it computes with those before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.gpu.warpgroup import (
    Warpgroup,
    mask_operands,
    matrix_memory,
    whole_tiles,
)
from jaxlm.ops.attention.spec import AttentionSpec, Tokens
from jaxlm.ops.attention.visibility import BlockTable, Extent, Grid, make_table

# A result leaves through the memory of the operand that has its shape.
HELD_IN = {"z": "q", "dq": "q", "dk": "k", "dv": "v"}


@dataclass(frozen=True)
class Side:
    """What a program holds of the queries or of the keys in shared memory."""

    name: str
    """query or key."""
    block: int
    matrices: tuple[str, ...]
    """Operands [B, rows, heads, H]."""
    floats: tuple[str, ...] = ()
    """Operands [B, heads, rows], f32."""
    buffers: int = 0
    """Blocks that are held at once; 0: the side stays, with one block."""

    def memory(self, operands: dict[str, Any], H: int, dtype: Any) -> dict[str, Any]:
        """Shared memory, and the barriers that say when it is filled."""
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
        """Operands of the mask [B, rows] that are there."""
        names = (f"{self.name}_positions", f"{self.name}_segments")
        return [name for name in names if name in operands]

    @property
    def ready(self) -> str:
        return f"{self.name}_ready"


@dataclass(frozen=True)
class StreamingKernel:
    """What is known of a kernel when it is traced."""

    spec: AttentionSpec
    grid: Grid
    group: int
    """Query heads for each key head."""
    stays: Side
    streams: Side
    interpret: bool

    @property
    def rows(self) -> int:
        """Rows of the side that stays, in whole blocks."""
        return self._blocks * self.stays.block

    @property
    def _blocks(self) -> int:
        """One program for each."""
        grid, queries = self.grid, self.stays.name == "query"
        return grid.query_blocks if queries else grid.key_blocks

    def launch(
        self,
        program: Callable[["Running"], None],
        matrices: dict[str, Array],
        floats: dict[str, Array],
        outputs: dict[str, jax.ShapeDtypeStruct],
    ) -> dict[str, Array]:
        """Runs a program for each (head, block, batch row).

        Args:
          matrices: q, k, v and dz, [B, rows, heads, H].
          floats: f32 [B, heads, whole blocks of rows]; sinks [heads].
        """
        q = matrices["q"]
        operands: dict[str, Any] = {
            name: whole_tiles(x, 1) for name, x in matrices.items()
        }
        operands |= floats | mask_operands(self.spec.mask, q.shape[0])
        operands["table"] = make_table(self.spec.mask, self.grid)
        memory = self.stays.memory(operands, q.shape[-1], q.dtype)
        memory |= self.streams.memory(operands, q.shape[-1], q.dtype)
        if "lse" in outputs:
            memory["lse"] = plgpu.SMEM((self.stays.block,), jnp.float32)
        trees = (operands, outputs, memory)
        leaves, shapes = zip(*(jax.tree.flatten(x) for x in trees), strict=True)

        def body(*refs):
            refs = iter(refs)
            groups = [[next(refs) for _ in part] for part in leaves]
            place = map(lax.axis_index, ("head", "block", "row"))
            program(Running(self, *map(jax.tree.unflatten, shapes, groups), *place))

        # Profiles show it.
        body.__name__ = program.__name__.strip("_")
        arrays, types, scratch = leaves
        heads = matrices[self.stays.matrices[0]].shape[2]
        results = Warpgroup(self.interpret).kernel(
            body,
            soft_cap=self.spec.soft_cap,
            out_type=types,
            scratch_types=scratch,
            grid=(heads, self._blocks, q.shape[0]),
            grid_names=("head", "block", "row"),
        )(*arrays)
        return jax.tree.unflatten(shapes[1], results)


@dataclass(frozen=True)
class Running:
    """A running program: its references, and what it does with them."""

    kernel: StreamingKernel
    ins: dict[str, Any]
    out: dict[str, Any]
    memory: dict[str, Any]
    head: Any
    block: Any
    row: Any

    @property
    def warpgroup(self) -> Warpgroup:
        return Warpgroup(self.kernel.interpret)

    @property
    def table(self) -> BlockTable:
        return self.ins["table"]

    def extent(self, side: Side, block: Any) -> Extent:
        """Least and greatest position and segment of a block."""
        keys = side.name == "key"
        read = self.table.key_extent if keys else self.table.query_extent
        return read(self.row, block)

    def tile(self, name: str, slot: Any = None) -> Any:
        """A matrix or a vector in shared memory; a slot for the side that streams."""
        return self.memory[name] if slot is None else self.memory[name].at[slot]

    def zeros(self, name: str) -> Any:
        """f32 zeros of the shape of this program's block of an output."""
        return self.warpgroup.full(self.memory[HELD_IN[name]].shape, 0.0)

    def fetch(self, side: Side, slot: Any, block: Any, head: Any) -> None:
        """Starts the copies of a block into shared memory."""
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

    def stream(self, turns: Any, place: Callable, step: Callable, carry: Any) -> Any:
        """carry = step(turn, slot, carry) for each turn.

        The block and the head that `place(turn)` gives are then in the slot, beside the
        block that stays.
        """
        stays, streams = self.kernel.stays, self.kernel.streams
        self.fetch(stays, None, self.block, self.head)
        for turn in range(streams.buffers):
            at = jnp.int32(turn)
            pl.when(at < turns)(lambda at=at: self.fetch(streams, at, *place(at)))
        plgpu.barrier_wait(self.tile(stays.ready))

        def body(turn, carry):
            slot = lax.rem(turn, jnp.int32(streams.buffers))
            plgpu.barrier_wait(self.tile(streams.ready, slot))
            carry = step(turn, slot, carry)
            # Nothing may be copied over what some warp still reads.
            plgpu.commit_smem()
            later = turn + streams.buffers
            pl.when(later < turns)(lambda: self.fetch(streams, slot, *place(later)))
            return carry

        return lax.fori_loop(0, turns, body, carry)

    def scores(
        self, raw: Any, whole: Any, other: Any, slot: Any, axis: int
    ) -> tuple[Any, Any]:
        """Scores of both blocks, and the same with those that are hidden at `MASKED`.

        Args:
          raw: q k^T, or k q^T: queries lie along `axis`.
          whole: whether all scores are visible.
          slot: where the other block is.
        """
        spec = self.kernel.spec
        scores = online_softmax.scores(raw, spec.scale, spec.soft_cap)

        def hide(scores):
            stays = self._tokens(self.kernel.stays, self.block, None, raw.shape, 0)
            streams = self._tokens(self.kernel.streams, other, slot, raw.shape, 1)
            pair = (stays, streams) if axis == 0 else (streams, stays)
            allowed = spec.mask.allowed(*pair, self.kernel.grid.num_keys)
            return online_softmax.hide(scores, allowed)

        return scores, lax.cond(whole, lambda scores: scores, hide, scores)

    def _tokens(self, side: Side, block: Any, slot: Any, shape: tuple, axis: int):
        """Positions and segments of a block, spread over a matrix of scores."""

        def load(name):
            if name not in self.memory:
                return None
            return self.warpgroup.load(self.tile(name, slot), shape, axis)

        positions = load(f"{side.name}_positions")
        if positions is None:
            positions = self.warpgroup.iota(block * side.block, shape, axis)
        return Tokens(positions, load(f"{side.name}_segments"))

    def store(self, outputs: dict[str, Any], lse: Any = None) -> None:
        """Writes this program's block of the outputs, and waits until it is done."""
        rows = pl.ds(self.block * self.kernel.stays.block, self.kernel.stays.block)
        copies = []
        for name, x in outputs.items():
            held = self.memory[HELD_IN[name]]
            held[...] = x.astype(held.dtype)
            copies.append((held, self.out[name].at[self.row, rows, self.head]))
        if lse is not None:
            held = self.memory["lse"]
            held[...] = lse
            copies.append((held, self.out["lse"].at[self.row, self.head, rows]))
        plgpu.commit_smem()
        for held, target in copies:
            plgpu.copy_smem_to_gmem(held, target)
        plgpu.wait_smem_to_gmem(0)
