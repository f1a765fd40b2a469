"""What GPU kernels share: how matrices lie in shared memory, and the few things that
are written differently for Pallas' interpreter (Mosaic GPU, Hopper)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

# Rows of a matrix product of one warpgroup.
ROWS = 64
# Shared memory that one program may have on an H100.
SHARED_BYTES = 232448


def matrix_memory(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory as matrix instructions read it: tiles of 8 rows, swizzled so that
    no two threads meet in a memory bank."""
    size = jnp.dtype(dtype).itemsize
    row = shape[-1] * size
    swizzle = next((width for width in (128, 64, 32) if row % width == 0), None)
    if swizzle is None:
        return plgpu.SMEM(shape, dtype)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM(
        shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle))
    )


def whole_tiles(x: Array, axis: int) -> Array:
    """x with zeros up to a multiple of 8 along an axis.

    The copy engine fills what lies outside an array with zeros, but whole tiles of 8
    rows at a time. No copy where the length is a multiple, as those of caches are.
    """
    missing = -x.shape[axis] % 8
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


@dataclass(frozen=True)
class Machine:
    """What is written differently for the interpreter, which has no layouts and
    multiplies neither transposed matrices nor those in registers."""

    interpret: bool

    def _place(self, x: Any, layout: Any) -> Any:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def row_values(self, x: Any) -> Any:
        """[rows] as threads hold it beside a matrix [rows, columns]."""
        return self._place(x, plgpu.Layout.WGMMA.reduce(1))

    def column_values(self, x: Any) -> Any:
        """[columns], likewise."""
        return self._place(x, plgpu.Layout.WGMMA.reduce(0))

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        """f32 [rows] or [rows, columns]."""
        x = jnp.full(shape, value, jnp.float32)
        if len(shape) == 1:
            return self.row_values(x)
        return self._place(x, plgpu.Layout.WGMMA)

    def count(self, start: Any, shape: tuple[int, int], axis: int) -> Any:
        """start, start + 1, ... along an axis, int32."""
        if self.interpret:
            return start + lax.broadcasted_iota(jnp.int32, shape, axis)
        layout = plgpu.Layout.WGMMA
        return start + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

    def widen(self, source: Any, target: Any) -> None:
        """target = source for matrices in shared memory, int8 to 16 bits."""
        # Four neighbours for each thread: one load, one instruction for two of them.
        x = self._place(source[...], plgpu.Layout.WGMMA_UPCAST_2X)
        target[...] = x.astype(target.dtype)
        plgpu.commit_smem()

    def scores(self, q: Any, k: Any, meanwhile: Any = lambda: None) -> Any:
        """q k', f32 [rows, keys], of matrices in shared memory.

        Args:
          meanwhile: called while the product runs.
        """
        if self.interpret:
            meanwhile()
            return _dot(q[...], k[...], 1)

        def run(total):
            plgpu.wgmma(total, q, k.transpose((1, 0)))
            meanwhile()
            return total[...]

        return pl.run_scoped(run, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def add_product(self, total: Any, probs: Any, v: Any) -> Any:
        """total + probs v, f32 [rows, H]; only v is in shared memory."""
        if self.interpret:
            return total + _dot(probs, v[...], 0)
        run = pl.run_state(lambda total: plgpu.wgmma(total, probs, v))
        return run(plgpu.ACC.init(total))

    def kernel(self, body: Any, *, approximate: bool, **options: Any) -> Any:
        """`plgpu.kernel`.

        Args:
          approximate: the chip's own exp, good to 2 ** -22. Its tanh is good to
            2 ** -11 only: not for a soft cap, as errors of scores are relative errors
            of probabilities.
        """
        if self.interpret:
            options["interpret"] = interpreter()
        # Sums and maxima of rows stay within a warp, which needs no scratch for them.
        params = plgpu.CompilerParams(
            approx_math=approximate, reduction_scratch_bytes=512
        )
        return plgpu.kernel(body, compiler_params=params, **options)


def _dot(a: Any, b: Any, axis: int) -> Any:
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


def declines(head_dim: int, dtype: Any) -> str | None:
    """Why matrix instructions cannot take such rows as they are; None: they can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype).name} is neither bfloat16 nor float16"
    if head_dim % 16 or head_dim > 256:
        return f"head_dim {head_dim} is not a multiple of 16 up to 256"
    return None


def check_block_keys(block_keys: int) -> None:
    """Matrices in shared memory are 64 numbers wide; a copy has at most 256 rows."""
    if block_keys % 64 or not 64 <= block_keys <= 256:
        raise ValueError(f"block_keys is {block_keys}, not 64, 128, 192 or 256")


def along_rows(x: Any, shape: tuple[int, int]) -> Any:
    """[rows] -> [rows, columns]"""
    return lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x: Any, shape: tuple[int, int]) -> Any:
    """[columns] -> [rows, columns]"""
    return lax.broadcast_in_dim(x, shape, (1,))
