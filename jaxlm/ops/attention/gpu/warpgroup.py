"""What all GPU kernels share.

How a warpgroup holds and multiplies matrices, how these lie in shared memory, and what
is written differently for Pallas' interpreter.

Pallas Mosaic GPU, for Hopper: a warpgroup is four warps, which multiply together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxlm.ops.attention.spec import Mask

# Accumulators of the tensor cores, in registers.
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# Rows of a matrix product of one warpgroup.
ROWS = 64
# Shared memory that one program may have on an H100.
SHARED_BYTES = 232448


def matrix_memory(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory as matrix instructions read it.

    Tiles of 8 rows, swizzled so that no two threads meet in a memory bank.
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


def whole_tiles(x: Array, axis: int) -> Array:
    """x with zeros up to a multiple of 8 along an axis.

    The copy engine fills what lies outside an array with zeros, but whole tiles of 8
    rows at a time. No copy where the length is a multiple, as those of caches are.
    """
    missing = -x.shape[axis] % 8
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def mask_operands(mask: Mask, batch: int) -> dict[str, Array]:
    """The mask's arrays, by name, as kernels copy them: int32 [B, rows]."""
    names = ("query_positions", "query_segments", "key_segments")
    given = {name: getattr(mask, name) for name in names}
    return {
        name: whole_tiles(
            jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, x.shape[1])), 1
        )
        for name, x in given.items()
        if x is not None
    }


def spread(x: Any, shape: tuple[int, int], axis: int) -> Any:
    """A vector along one axis of a matrix, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, (axis,))


@dataclass(frozen=True)
class Warpgroup:
    """How one warpgroup holds numbers and multiplies them.

    The interpreter has no layouts, and multiplies neither transposed matrices nor those
    in registers: it gets the same dot products in JAX.
    """

    interpret: bool

    def _place(self, x: Any, layout: Any) -> Any:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        """f32 [rows] or [rows, columns]."""
        x = jnp.full(shape, value, jnp.float32)
        layout = plgpu.Layout.WGMMA
        return self._place(x, layout.reduce(1) if len(shape) == 1 else layout)

    def iota(self, start: Any, shape: tuple[int, int], axis: int) -> Any:
        """start, start + 1, ... along an axis, int32."""
        if self.interpret:
            return start + lax.broadcasted_iota(jnp.int32, shape, axis)
        layout = plgpu.Layout.WGMMA
        return start + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

    def load(self, vector: Any, shape: tuple[int, int], axis: int) -> Any:
        """A vector in shared memory, along one axis of a matrix."""
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        return spread(self._place(vector[...], layout), shape, axis)

    def widen(self, source: Any, target: Any) -> None:
        """target = source for matrices in shared memory, int8 to 16 bits."""
        # Four neighbours for each thread: one load, one instruction for two of them.
        x = self._place(source[...], plgpu.Layout.WGMMA_UPCAST_2X)
        target[...] = x.astype(target.dtype)
        plgpu.commit_smem()

    def dot(self, a: Any, b: Any, meanwhile: Any = lambda: None) -> Any:
        """a b^T, f32 [rows of a, rows of b], of matrices in shared memory.

        Args:
          meanwhile: called while the tensor cores work.
        """
        if self.interpret:
            meanwhile()
            return _interpreted_dot(a[...], b[...], 1)

        def run(acc):
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
            meanwhile()
            return acc[...]

        return pl.run_scoped(run, ACC((a.shape[0], b.shape[0]), jnp.float32))

    def accumulate(self, acc: Any, p: Any, b: Any) -> Any:
        """acc + p b, f32 [rows, H]; b is in shared memory, p in registers, f32.

        p is rounded to the dtype of b.
        """
        p = p.astype(b.dtype)
        if self.interpret:
            return acc + _interpreted_dot(p, b[...], 0)
        run = pl.run_state(lambda acc: plgpu.wgmma(acc, p, b))
        return run(ACC.init(acc))

    def kernel(self, body: Any, *, soft_cap: float | None, **options: Any) -> Any:
        """`plgpu.kernel`.

        Without a soft cap with the chip's own exp, good to 2 ** -22. Its tanh is good
        to 2 ** -11 only, and errors of scores are relative errors of probabilities.
        """
        if self.interpret:
            options["interpret"] = interpreter()
        # Sums and maxima of rows stay within a warp, which needs no scratch for them.
        params = plgpu.CompilerParams(
            approx_math=soft_cap is None, reduction_scratch_bytes=512
        )
        return plgpu.kernel(body, compiler_params=params, **options)


def _interpreted_dot(a: Any, b: Any, axis: int) -> Any:
    dims = (((1,), (axis,)), ((), ()))
    # Tensor cores and the copy engine see one another's accesses; threads need a fence.
    plgpu.commit_smem()
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def interpreter() -> Any:
    """Parameters of Pallas' interpreter of GPU kernels."""
    try:
        params = plgpu.InterpretGPUParams
    except AttributeError:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import (
            InterpretGPUParams as params,
        )
    # As the copy engine does, zeros for what lies outside an array.
    return params(out_of_bounds_reads="uninitialized", uninitialized_memory="zero")
