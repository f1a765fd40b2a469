"""Flash attention and its gradient for Hopper GPUs, in Pallas Mosaic GPU.

After FlashAttention-2 (Dao 2023, arXiv:2307.08691), with the asynchronous copies and
tensor cores that FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) uses. Each
program is one warpgroup and owns one block; the blocks that it meets are copied to
shared memory while it computes with those before. dq has a kernel of its own, so that
no two programs add to one place: every run gives the same numbers.

Tensor cores have no float32. Its numbers are cut into three bfloat16 parts, which is
exact, and the six greatest of the nine products are added: each product of numbers is
off by at most 2^-23 of itself.

In shapes: B batch, T queries, S keys, N query heads, K key heads, H head dimension,
P parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxlm.ops.attention import formulas
from jaxlm.ops.attention.gpu.mosaic import SHARED_BYTES, interpreter, matrix_memory
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Tokens
from jaxlm.ops.attention.visibility import Extent, Grid, make_table

# A bound of what is in shared memory and is no matrix, in bytes.
SMALL = 8192
MOST_HEAD_DIM = {"bfloat16": 256, "float16": 256, "float32": 128}
# A result leaves through the memory of the operand that has its shape.
PLACE_OF = {"z": "q", "dq": "q", "dk": "k", "dv": "v"}


@dataclass(frozen=True)
class Settings:
    """Block sizes, multiples of 64, and how many blocks are held at once of what a
    program loops over: one is in use, the others are on their way."""

    block_queries: int = 64
    block_keys: int = 64
    buffers: int = 2
    backward_block_queries: int = 64
    backward_block_keys: int = 64
    backward_buffers: int = 2
    interpret: bool = False
    """Run on the CPU, in the interpreter of Pallas."""

    def __post_init__(self):
        sizes = (self.block_queries, self.block_keys)
        sizes += (self.backward_block_queries, self.backward_block_keys)
        for size in sizes:
            if size <= 0 or size % 64:
                raise ValueError(f"block of {size}: not a multiple of 64")


def buffers(head_dim: int, dtype: Any) -> tuple[int, int]:
    """How many buffers, forward and backward, of blocks of 64 fit into an H100."""
    matrix = 64 * _width(head_dim) * 2 * _num_parts(dtype)
    most = (SHARED_BYTES - SMALL) // matrix
    # Beside buffers of two matrices, forward holds one and backward two.
    return min(2, (most - 1) // 2), min(2, (most - 2) // 2)


def declines(head_dim: int, dtype: Any) -> str | None:
    """Why these kernels cannot take it; None: they can."""
    name = jnp.dtype(dtype).name
    if name not in MOST_HEAD_DIM:
        return f"{name} is not one of {', '.join(MOST_HEAD_DIM)}"
    most = MOST_HEAD_DIM[name]
    if head_dim > most:
        return f"head_dim {head_dim} is above {most}, the most for {name}"
    return None


def forward(
    q: Array, k: Array, v: Array, spec: AttentionSpec, settings: Settings
) -> tuple[Array, Array]:
    """z [B, T, N, H] in q's dtype and the log-sum-exp [B, N, T], f32."""
    B, T, N, _ = q.shape
    grid = Grid(T, k.shape[1], settings.block_queries, settings.block_keys)
    kernel = _Kernel(
        spec,
        grid,
        group=N // k.shape[2],
        parts=_num_parts(q.dtype),
        queries=_Side("query", grid.block_queries, ("q",)),
        keys=_Side("key", grid.block_keys, ("k", "v"), buffers=settings.buffers),
        interpret=settings.interpret,
    )
    operands = {"q": _parts(q), "k": _parts(k), "v": _parts(v), **kernel.integers()}
    if spec.sinks is not None:
        operands["sinks"] = spec.sinks.astype(jnp.float32)
    rows = grid.query_blocks * grid.block_queries
    outputs = {
        "z": _like(operands["q"], rows),
        "lse": jax.ShapeDtypeStruct((B, N, rows), jnp.float32),
    }
    programs = (N, grid.query_blocks, B)
    out = kernel.launch(_forward_program, operands, outputs, programs)
    return _whole(out["z"], q), out["lse"][:, :, :T]


def backward(
    q: Array,
    k: Array,
    v: Array,
    spec: AttentionSpec,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    dz: Array,
    settings: Settings,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv, shaped as q, k and v, in their dtypes; see `flash.Kernels`."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grid = Grid(T, S, settings.backward_block_queries, settings.backward_block_keys)
    queries = _Side("query", grid.block_queries, ("q", "dz"), ("lse", "delta"))
    keys = _Side("key", grid.block_keys, ("k", "v"))
    kernel = _Kernel(
        spec,
        grid,
        group=N // K,
        parts=_num_parts(q.dtype),
        queries=queries,
        keys=replace(keys, buffers=settings.backward_buffers),
        interpret=settings.interpret,
    )
    rows = grid.query_blocks * grid.block_queries
    beyond = [(0, 0), (0, 0), (0, rows - T)]
    operands = {
        **{"q": _parts(q), "k": _parts(k), "v": _parts(v), "dz": _parts(dz)},
        # Queries beyond the last have no probabilities.
        "lse": jnp.pad(lse, beyond, constant_values=-MASKED),
        "delta": jnp.pad(delta, beyond),
        **kernel.integers(),
    }
    outputs = {"dq": _like(operands["q"], rows)}
    programs = (N, grid.query_blocks, B)
    dq = kernel.launch(_query_program, operands, outputs, programs)["dq"]

    queries = replace(queries, buffers=settings.backward_buffers)
    kernel = replace(kernel, queries=queries, keys=keys)
    rows = grid.key_blocks * grid.block_keys
    outputs = {"dk": _like(operands["k"], rows), "dv": _like(operands["v"], rows)}
    # Above this, two sums are too much for the registers of a warpgroup.
    apart = [{name: out} for name, out in outputs.items()] if H > 128 else [outputs]
    programs = (K, grid.key_blocks, B)
    dkv = {}
    for some in apart:
        dkv |= kernel.launch(_key_program, operands, some, programs)
    return _whole(dq, q), _whole(dkv["dk"], k), _whole(dkv["dv"], v)


def _forward_program(run: "_Run") -> None:
    """z and the log-sum-exp of one block of queries of one head."""
    n, i, grid = run.head, run.block, run.kernel.grid
    table, sides = run.ins["table"], (run.kernel.queries, run.kernel.keys)
    first = run.entry(table.first_key, i, grid.query_blocks)
    last = run.entry(table.last_key, i, grid.query_blocks)
    queries, key_head = run.extent(sides[0], i), lax.div(n, jnp.int32(run.kernel.group))

    def step(turn, slot, carry):
        j = first + turn
        some, whole = run.meet(queries, run.extent(sides[1], j))

        def work(carry):
            acc, top, weight = carry
            raw = run.product(run.tiles("q"), run.tiles("k", slot), transposed=True)
            _, s = run.scores(raw, whole, i, j, (0, slot), 0)
            greater = jnp.maximum(top, jnp.max(s, axis=1))
            shrink = jnp.exp(top - greater)
            probs = jnp.exp(s - _spread(greater, s.shape, 0))
            weight = weight * shrink + jnp.sum(probs, axis=1)
            acc = acc * _spread(shrink, acc.shape, 0)
            acc = run.product(run.split(probs), run.tiles("v", slot), onto=acc)
            return acc, greater, weight

        return lax.cond(some, work, lambda carry: carry, carry)

    run.fetch(sides[0], 0, i, n)
    acc, top, weight = run.stream(
        sides[1],
        last - first,
        lambda turn: (first + turn, key_head),
        step,
        (run.zeros("z"), run.fill(MASKED), run.fill(0.0)),
    )
    sink = run.ins["sinks"][n] if "sinks" in run.ins else None
    factor, lse = formulas.finish(top, weight, sink)
    z = acc * _spread(factor, acc.shape, 0)
    run.store(sides[0], {"z": z}, {"lse": lse})


def _query_program(run: "_Run") -> None:
    """dq of one block of queries of one head."""
    n, i, grid = run.head, run.block, run.kernel.grid
    table, sides = run.ins["table"], (run.kernel.queries, run.kernel.keys)
    first = run.entry(table.first_key, i, grid.query_blocks)
    last = run.entry(table.last_key, i, grid.query_blocks)
    queries, key_head = run.extent(sides[0], i), lax.div(n, jnp.int32(run.kernel.group))

    def step(turn, slot, dq):
        j = first + turn
        some, whole = run.meet(queries, run.extent(sides[1], j))

        def work(dq):
            raw = run.product(run.tiles("q"), run.tiles("k", slot), transposed=True)
            probs, slope = run.probs(raw, whole, i, j, (0, slot), 0)
            dprobs = run.product(run.tiles("dz"), run.tiles("v", slot), transposed=True)
            delta = run.load("delta", 0, raw.shape, 0)
            ds = formulas.dscores(probs, dprobs, delta, slope)
            return run.product(run.split(ds), run.tiles("k", slot), onto=dq)

        return lax.cond(some, work, lambda dq: dq, dq)

    run.fetch(sides[0], 0, i, n)
    dq = run.stream(
        sides[1],
        last - first,
        lambda turn: (first + turn, key_head),
        step,
        run.zeros("dq"),
    )
    run.store(sides[0], {"dq": dq})


def _key_program(run: "_Run") -> None:
    """dk, dv or both of one block of keys of one key head: sums over its queries and
    over the query heads that it serves. Scores lie as [keys, queries]."""
    head, j, grid = run.head, run.block, run.kernel.grid
    table, sides = run.ins["table"], (run.kernel.queries, run.kernel.keys)
    first = run.entry(table.first_query, j, grid.key_blocks)
    last = run.entry(table.last_query, j, grid.key_blocks)
    keys = run.extent(sides[1], j)

    def place(turn):
        """Block and head of the queries at this turn."""
        n = head * run.kernel.group + lax.div(turn, last - first)
        return first + lax.rem(turn, last - first), n

    def step(turn, slot, sums):
        i, _ = place(turn)
        some, whole = run.meet(run.extent(sides[0], i), keys)

        def work(sums):
            sums = dict(sums)
            raw = run.product(run.tiles("k"), run.tiles("q", slot), transposed=True)
            probs, slope = run.probs(raw, whole, i, j, (slot, 0), 1)
            if "dv" in sums:
                weights = run.split(probs)
                sums["dv"] = run.product(
                    weights, run.tiles("dz", slot), onto=sums["dv"]
                )
            if "dk" in sums:
                dprobs = run.product(
                    run.tiles("v"), run.tiles("dz", slot), transposed=True
                )
                delta = run.load("delta", slot, raw.shape, 1)
                ds = run.split(formulas.dscores(probs, dprobs, delta, slope))
                sums["dk"] = run.product(ds, run.tiles("q", slot), onto=sums["dk"])
            return sums

        return lax.cond(some, work, lambda sums: sums, sums)

    run.fetch(sides[1], 0, j, head)
    turns = (last - first) * run.kernel.group
    start = {name: run.zeros(name) for name in run.out}
    sums = run.stream(sides[0], turns, place, step, start)
    run.store(sides[1], sums)


@dataclass(frozen=True)
class _Side:
    """What a program has of the queries or of the keys in shared memory."""

    name: str
    """query or key."""
    block: int
    matrices: tuple[str, ...]
    """Operands [P, B, rows, heads, H]."""
    floats: tuple[str, ...] = ()
    """Operands [B, heads, rows], f32."""
    buffers: int = 1

    def integers(self, spec: AttentionSpec) -> list[str]:
        """Fields of the spec with a number for each row."""
        names = (f"{self.name}_positions", f"{self.name}_segments")
        return [x for x in names if getattr(spec.mask, x, None) is not None]

    @property
    def ready(self) -> str:
        return f"{self.name} ready"


@dataclass(frozen=True)
class _Kernel:
    """What is known of a kernel when tracing."""

    spec: AttentionSpec
    grid: Grid
    group: int
    """Query heads for each key head."""
    parts: int
    """Matrices that an operand is the sum of."""
    queries: _Side
    keys: _Side
    interpret: bool

    def integers(self) -> dict:
        """Operands: the table of blocks, and the spec's integers [1 or B, rows]."""
        operands = {"table": make_table(self.spec.mask, self.grid)}
        for side in (self.queries, self.keys):
            for name in side.integers(self.spec):
                x = getattr(self.spec.mask, name)
                missing = -x.shape[1] % side.block
                operands[name] = jnp.pad(x, ((0, 0), (0, missing)), mode="edge")
        return operands

    def memory(self, side: _Side, width: int, dtype: Any) -> dict:
        """Shared memory of one side, and the barriers that say when it is filled."""
        memory = {
            name: matrix_memory((side.buffers, self.parts, side.block, width), dtype)
            for name in side.matrices
        }
        for name in side.floats:
            memory[name] = plgpu.SMEM((side.buffers, side.block), jnp.float32)
        for name in side.integers(self.spec):
            memory[name] = plgpu.SMEM((side.buffers, side.block), jnp.int32)
        copies = len(memory) + (self.parts - 1) * len(side.matrices)
        memory[side.ready] = plgpu.Barrier(
            num_arrivals=copies, num_barriers=side.buffers
        )
        return memory

    def launch(
        self,
        program: Callable[["_Run"], None],
        operands: dict,
        outputs: dict,
        programs: tuple[int, int, int],
    ) -> dict:
        """Runs a program for each (head, block, batch row)."""
        q = operands["q"]
        memory = self.memory(self.queries, q.shape[-1], q.dtype)
        memory |= self.memory(self.keys, q.shape[-1], q.dtype)
        if "lse" in outputs:
            memory["lse"] = plgpu.SMEM((1, self.queries.block), jnp.float32)
        trees = (operands, outputs, memory)
        leaves, shapes = zip(*(jax.tree.flatten(x) for x in trees), strict=True)

        def body(*refs):
            refs = iter(refs)
            groups = [[next(refs) for _ in part] for part in leaves]
            names = ("head", "block", "batch")
            place = map(lax.axis_index, names)
            program(_Run(self, *map(jax.tree.unflatten, shapes, groups), *place))

        # Profiles show it.
        body.__name__ = program.__name__.strip("_")
        arrays, types, scratch = leaves
        results = plgpu.kernel(
            body,
            out_type=types,
            scratch_types=scratch,
            grid=programs,
            grid_names=("head", "block", "batch"),
            compiler_params=plgpu.CompilerParams(
                # exp to 22 bits; its tanh has 11, too few for a soft cap.
                approx_math=self.parts == 1 and self.spec.soft_cap is None
            ),
            interpret=interpreter() if self.interpret else None,
        )(*arrays)
        return jax.tree.unflatten(shapes[1], results)


@dataclass(frozen=True)
class _Run:
    """A running program: its references, and what it does with them."""

    kernel: _Kernel
    ins: dict
    out: dict
    memory: dict
    head: Any
    block: Any
    row: Any

    def entry(self, column: Any, block: Any, blocks: int) -> Any:
        """The number of a block in a column of the table."""
        rows = column.shape[0] // blocks
        return column[(self.row if rows > 1 else 0) * blocks + block]

    def extent(self, side: _Side, block: Any) -> Extent:
        """Least and greatest position and segment of a block."""
        table = self.ins["table"]
        read = table.key_extent if side.name == "key" else table.query_extent
        return read(self.row, block)

    def meet(self, queries: Extent, keys: Extent) -> tuple[Any, Any]:
        """Whether a block of queries sees something of one of keys, and whether all."""
        return self.ins["table"].meet(queries, keys)

    def fetch(self, side: _Side, slot: Any, block: Any, head: Any) -> None:
        """Starts the copies of a block into a slot of shared memory."""
        rows = pl.ds(block * side.block, side.block)
        ready = self.memory[side.ready].at[slot]

        def copy(name, source, *part):
            target = self.memory[name].at[(slot, *part)]
            plgpu.copy_gmem_to_smem(self.ins[name].at[source], target, ready)

        for name in side.matrices:
            for p in range(self.kernel.parts):
                copy(name, (p, self.row, rows, head), p)
        for name in side.floats:
            copy(name, (self.row, head, rows))
        for name in side.integers(self.kernel.spec):
            copy(name, (self.row if self.ins[name].shape[0] > 1 else 0, rows))

    def wait(self, side: _Side, slot: Any) -> None:
        plgpu.barrier_wait(self.memory[side.ready].at[slot])

    def stream(
        self, side: _Side, turns: Any, place: Callable, step: Callable, carry: Any
    ) -> Any:
        """carry = step(turn, slot, carry) for each turn, with the block and head that
        `place(turn)` gives in a slot. The block of the other side was fetched before.
        """
        kernel = self.kernel
        other = kernel.queries if side is kernel.keys else kernel.keys
        for turn in range(side.buffers):
            at = jnp.int32(turn)
            pl.when(at < turns)(lambda at=at: self.fetch(side, at, *place(at)))
        self.wait(other, 0)

        def body(turn, carry):
            slot = lax.rem(turn, jnp.int32(side.buffers))
            self.wait(side, slot)
            carry = step(turn, slot, carry)
            # Nothing may be copied over what some warp still reads.
            plgpu.commit_smem()
            later = turn + side.buffers
            pl.when(later < turns)(lambda: self.fetch(side, slot, *place(later)))
            return carry

        return lax.fori_loop(0, turns, body, carry)

    def tiles(self, name: str, slot: Any = 0) -> "_Tiles":
        return _Tiles(self.memory[name], slot)

    def split(self, x: Any) -> list:
        """The parts of a matrix in registers, f32."""
        return _split(x, self.kernel.parts, self.ins["q"].dtype)

    def product(
        self, a: Any, b: "_Tiles", *, transposed: bool = False, onto: Any = None
    ) -> Any:
        """a b, or a b^T if transposed, plus `onto`, f32.

        The interpreter knows neither a matrix in registers nor one that is transposed,
        and gets the same product in JAX.
        """
        pairs = [
            (i, j)
            for i in range(self.kernel.parts)
            for j in range(self.kernel.parts - i)
        ]
        if self.kernel.interpret:
            x, y = (m if isinstance(m, list) else m.ref.at[m.slot][...] for m in (a, b))
            for i, j in pairs:
                left, right = x[i].astype(jnp.float32), y[j].astype(jnp.float32)
                right = right.T if transposed else right
                out = jnp.dot(left, right, precision="highest")
                onto = out if onto is None else onto + out
            return onto

        def run(acc):
            for i, j in pairs:
                right = b[j].transpose((1, 0)) if transposed else b[j]
                plgpu.wgmma(acc, a[i], right)
            return acc[...] if onto is None else None

        if onto is not None:
            return pl.run_state(run)(plgpu.ACC.init(onto))
        shape = a[0].shape[0], b[0].shape[0 if transposed else 1]
        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def scores(
        self, raw: Any, whole: Any, i: Any, j: Any, slots: tuple, axis: int
    ) -> tuple[Any, Any]:
        """Scores of blocks i and j, and the same with hidden ones `MASKED`.

        Args:
          raw: the product of queries and keys; queries lie along `axis`.
          slots: where the integers of the queries and of the keys are.
        """
        spec, shape = self.kernel.spec, raw.shape
        scores = formulas.scores(raw, spec.scale, spec.soft_cap)

        def load(name, side):
            if name not in self.memory:
                return None
            return self.load(name, slots[side], shape, (axis, 1 - axis)[side])

        def hide(scores):
            positions = load("query_positions", 0)
            if positions is None:
                positions = self.count(i * self.kernel.queries.block, shape, axis)
            queries = Tokens(positions, load("query_segments", 0))
            positions = self.count(j * self.kernel.keys.block, shape, 1 - axis)
            keys = Tokens(positions, load("key_segments", 1))
            allowed = spec.mask.allowed(queries, keys, self.kernel.grid.num_keys)
            return formulas.hide(scores, allowed)

        return scores, lax.cond(whole, lambda scores: scores, hide, scores)

    def probs(
        self, raw: Any, whole: Any, i: Any, j: Any, slots: tuple, axis: int
    ) -> tuple[Any, Any]:
        """Probabilities from the log-sum-exp, and d scores / d raw; as `scores`."""
        spec = self.kernel.spec
        capped, scores = self.scores(raw, whole, i, j, slots, axis)
        lse = self.load("lse", slots[0], raw.shape, axis)
        slope = formulas.slope(capped, spec.scale, spec.soft_cap)
        return jnp.exp(scores - lse), slope

    def load(self, name: str, slot: Any, shape: tuple, axis: int) -> Any:
        """A vector from shared memory, along one axis of a matrix."""
        x = self.memory[name].at[slot][...]
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        return _spread(self.lay_out(x, layout), shape, axis)

    def count(self, start: Any, shape: tuple, axis: int) -> Any:
        """start, start + 1, ... along one axis of a matrix."""
        x = lax.broadcasted_iota(jnp.int32, shape, axis)
        return self.lay_out(x, plgpu.Layout.WGMMA) + start

    def zeros(self, name: str) -> Any:
        """f32 zeros of the shape of this program's part of an output."""
        shape = self.memory[PLACE_OF[name]].shape[2:]
        return self.lay_out(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    def fill(self, value: float) -> Any:
        """The same number for each query of the block, f32."""
        x = jnp.full((self.kernel.queries.block,), value, jnp.float32)
        return self.lay_out(x, plgpu.Layout.WGMMA.reduce(1))

    def lay_out(self, x: Any, layout: Any) -> Any:
        """Says how threads hold x. The interpreter of jax 0.10 knows no layouts."""
        return x if self.kernel.interpret else plgpu.layout_cast(x, layout)

    def store(self, side: _Side, matrices: dict, floats: dict | None = None) -> None:
        """Writes this program's block of the outputs, and waits until it is done."""
        rows = pl.ds(self.block * side.block, side.block)
        copies = []
        for name, x in matrices.items():
            held = self.memory[PLACE_OF[name]]
            for p, part in enumerate(self.split(x)):
                held.at[0, p][...] = part
                target = self.out[name].at[p, self.row, rows, self.head]
                copies.append((held.at[0, p], target))
        for name, x in (floats or {}).items():
            self.memory[name].at[0][...] = x
            target = self.out[name].at[self.row, self.head, rows]
            copies.append((self.memory[name].at[0], target))
        plgpu.commit_smem()
        for held, target in copies:
            plgpu.copy_smem_to_gmem(held, target)
        plgpu.wait_smem_to_gmem(0)


@dataclass(frozen=True)
class _Tiles:
    """The parts of a matrix in shared memory. References are made where they are used:
    an accumulator's scope takes no index from outside that is a constant."""

    ref: Any
    slot: Any

    def __getitem__(self, part: int) -> Any:
        return self.ref.at[self.slot, part]


def _spread(x: Any, shape: tuple, axis: int) -> Any:
    """A vector along one axis of a matrix, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def _split(x: Any, parts: int, dtype: Any) -> list:
    """Numbers of `dtype`, the greatest first, that sum to those of x, f32.

    What is left after each is exact. Several are bfloat16, the upper half of the bits
    of a float32, rounded by hand: XLA takes a conversion there and back out.
    """
    out = []
    for _ in range(parts - 1):
        bits = lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(2**15)
        bits = bits & jnp.int32(-(2**16))
        high = lax.bitcast_convert_type(bits, jnp.float32)
        out.append(high.astype(dtype))
        x = x - high
    return [*out, x.astype(dtype)]


def _parts(x: Float[Array, "B R N H"]) -> Float[Array, "P B S N W"]:
    """x as the sum of matrices for tensor cores.

    Rows are filled up to a multiple of 8, the height of a tile: what lies beyond the
    last tile is zeros in shared memory. Columns to a multiple of 16, the least width.
    """
    below, beside = -x.shape[1] % 8, _width(x.shape[3]) - x.shape[3]
    if below or beside:
        x = jnp.pad(x, ((0, 0), (0, below), (0, 0), (0, beside)))
    if x.dtype != jnp.float32:
        return x[None]
    return jnp.stack(_split(x, _num_parts(x.dtype), jnp.bfloat16))


def _num_parts(dtype: Any) -> int:
    return 3 if jnp.dtype(dtype) == jnp.float32 else 1


def _width(head_dim: int) -> int:
    return head_dim + -head_dim % 16


def _like(parts: Array, rows: int) -> jax.ShapeDtypeStruct:
    """An output like an operand, of whole blocks."""
    P, B, _, N, W = parts.shape
    return jax.ShapeDtypeStruct((P, B, rows, N, W), parts.dtype)


def _whole(parts: Array, like: Array) -> Array:
    """The sum of parts, in the shape and dtype of an array."""
    x = parts[0] if len(parts) == 1 else parts.astype(jnp.float32).sum(axis=0)
    return x[:, : like.shape[1], :, : like.shape[3]].astype(like.dtype)
