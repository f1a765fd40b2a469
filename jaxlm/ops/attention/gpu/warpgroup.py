"""What all GPU kernels share: register layouts, matrix instructions, shared memory.

Written in Pallas Mosaic GPU, for Hopper, with what must differ in Pallas' interpreter.
A warpgroup is four warps that issue matrix instructions together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxlm.ops.attention.spec import MASKED, Mask

# Accumulators of matrix instructions, in registers.
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# Rows of one warpgroup's matrix instruction.
ROWS = 64
# Warpgroups that compute in a specialized kernel, beside one that copies.
CONSUMERS = 2
# Bytes of shared memory that one program may use on an H100.
SHARED_BYTES = 232448


def matrix_memory(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory in the layout of matrix instructions.

    That is tiles of 8 rows, swizzled to avoid bank conflicts.
    """
    size = jnp.dtype(dtype).itemsize
    row = shape[-1] * size
    swizzle = next((width for width in (128, 64, 32) if row % width == 0), None)
    if swizzle is None:
        return plgpu.SMEM(shape, dtype)
    tile = (8, swizzle // size)
    transforms = (
        plgpu.TilingTransform(tile),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def pad_to_tiles(x: Array, axis: int) -> Array:
    """Pads x with zeros to a multiple of 8 along an axis.

    The copy engine reads zeros outside an array, but only in whole tiles of 8 rows.
    Returns x itself if its length is a multiple of 8, as in caches.
    """
    missing = -x.shape[axis] % 8
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def mask_operands(mask: Mask, batch: int) -> dict[str, Array]:
    """Returns the mask's arrays by name, as kernels copy them: int32 [B, tokens]."""
    names = ("query_positions", "query_segments", "key_segments")
    given = {name: getattr(mask, name) for name in names}
    return {
        name: pad_to_tiles(
            jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, x.shape[1])), 1
        )
        for name, x in given.items()
        if x is not None
    }


def spread(x: Any, shape: tuple[int, int], axis: int) -> Any:
    """Broadcasts a vector, which lies along `axis`, to a matrix."""
    return lax.broadcast_in_dim(x, shape, (axis,))


@dataclass(frozen=True)
class Warpgroup:
    """The registers and matrix instructions of one warpgroup.

    Pallas' interpreter has no register layouts, and cannot multiply transposed matrices
    or matrices in registers; with `interpret`, JAX computes the same dot products.
    """

    interpret: bool

    def _layout_cast(self, x: Any, layout: Any) -> Any:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        """Returns an f32 array, [rows] or [rows, columns], filled with a value."""
        x = jnp.full(shape, value, jnp.float32)
        layout = plgpu.Layout.WGMMA
        return self._layout_cast(x, layout.reduce(1) if len(shape) == 1 else layout)

    def softmax_start(self, rows: int, H: int) -> tuple[Any, Any, Any]:
        """Returns m, l and acc of the online softmax before the first block."""
        m, l = self.full((rows,), MASKED), self.full((rows,), 0.0)
        return m, l, self.full((rows, H), 0.0)

    def iota(self, start: Any, shape: tuple[int, int], axis: int) -> Any:
        """Returns start, start + 1, ... along an axis of a matrix, int32."""
        if self.interpret:
            return start + lax.broadcasted_iota(jnp.int32, shape, axis)
        layout = plgpu.Layout.WGMMA
        return start + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

    def load(self, vector: Any, shape: tuple[int, int], axis: int) -> Any:
        """Loads a vector from shared memory, broadcast along `axis` of a matrix."""
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        return spread(self._layout_cast(vector[...], layout), shape, axis)

    def widen(self, source: Any, target: Any) -> None:
        """Casts int8 to 16 bits, from one matrix in shared memory to another."""
        # Each thread gets four neighbors: one load, and one instruction per two casts.
        x = self._layout_cast(source[...], plgpu.Layout.WGMMA_UPCAST_2X)
        target[...] = x.astype(target.dtype)
        plgpu.commit_smem()

    def dot(self, a: Any, b: Any, meanwhile: Any = lambda: None) -> Any:
        """Computes a b^T in f32, [rows of a, rows of b], from shared memory.

        Args:
          meanwhile: called while the tensor cores are busy.
        """
        return self.dots([(a, b)], meanwhile)[0]

    def dots(
        self, pairs: Sequence[tuple[Any, Any]], meanwhile: Any = lambda: None
    ) -> list[Any]:
        """Computes `dot` of several pairs of matrices, and waits once for all."""
        if self.interpret:
            meanwhile()
            return [_interpreted_dot(a[...], b[...], 1) for a, b in pairs]

        def run(*accs):
            for acc, (a, b) in zip(accs, pairs, strict=True):
                plgpu.wgmma(acc, a, b.transpose((1, 0)))
            meanwhile()
            return [acc[...] for acc in accs]

        sizes = [(a.shape[0], b.shape[0]) for a, b in pairs]
        return pl.run_scoped(run, *(ACC(size, jnp.float32) for size in sizes))

    def accumulate(self, acc: Any, p: Any, b: Any) -> Any:
        """Computes acc + p b in f32, [rows, H]; p is cast to b's dtype.

        p is f32 in registers, and b is in shared memory.
        """
        return self.accumulate_all([(acc, p, b)])[0]

    def accumulate_all(self, sums: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
        """Computes `accumulate` of several sums (acc, p, b), and waits once for all."""
        casts = [p.astype(b.dtype) for _, p, b in sums]
        if self.interpret:
            return [
                acc + _interpreted_dot(p, b[...], 0)
                for p, (acc, _, b) in zip(casts, sums, strict=True)
            ]

        def run(accs):
            for acc, p, (_, _, b) in zip(accs, casts, sums, strict=True):
                plgpu.wgmma(acc, p, b)

        return pl.run_state(run)([ACC.init(acc) for acc, _, _ in sums])

    def pipeline(self, body: Any, starts: Sequence[Any]) -> list[Any]:
        """Runs body(sums), which adds products to sums; returns the sums at its end.

        Args:
          starts: what the sums start with, f32 matrices.
        """
        if self.interpret:
            sums = [_InterpretedSum(x) for x in starts]
            body(sums)
            return [x.value for x in sums]
        return pl.run_state(body)([ACC.init(x) for x in starts])

    def add(self, total: Any, a: Any, b: Any, transposed: bool = False) -> None:
        """Starts adding a b, or a b^T, to a sum of `pipeline`.

        a is in shared memory or, with 16 bits, in registers; b is in shared memory.
        """
        if self.interpret:
            a = a if isinstance(a, jax.Array) else a[...]
            total.value += _interpreted_dot(a, b[...], int(transposed))
            return
        plgpu.wgmma(total, a, b.transpose((1, 0)) if transposed else b)

    def read(self, total: Any, pending: int) -> Any:
        """Returns a sum of `pipeline` once at most `pending` products are not done."""
        if self.interpret:
            return total.value
        return plgpu.wgmma_accumulator_load(total, wait_n=pending)

    def kernel(self, body: Any, *, soft_cap: float | None, **options: Any) -> Any:
        """Makes a kernel with `plgpu.kernel` and these options.

        Without a soft cap it uses the hardware's exp, accurate to 2 ** -22. The
        hardware's tanh is accurate only to 2 ** -11, and an absolute error of a score
        is a relative error of its probability.
        """
        if self.interpret:
            options["interpret"] = interpreter()
        # A row's sum and maximum stay within a warp, so they need no scratch.
        params = plgpu.CompilerParams(
            approx_math=soft_cap is None, reduction_scratch_bytes=512
        )
        return plgpu.kernel(body, compiler_params=params, **options)


@dataclass
class _InterpretedSum:
    value: Any


def _interpreted_dot(a: Any, b: Any, axis: int) -> Any:
    dims = (((1,), (axis,)), ((), ()))
    # Tensor cores are ordered with the copy engine; threads, as here, need a fence.
    plgpu.commit_smem()
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def interpreter() -> Any:
    """Returns the parameters of Pallas' GPU interpreter."""
    try:
        params = plgpu.InterpretGPUParams
    except AttributeError:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import (
            InterpretGPUParams as params,
        )
    # Out-of-bounds reads give zeros, as from the copy engine.
    return params(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
