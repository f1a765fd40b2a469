"""JAX's splash attention, a Pallas kernel for TPUs, behind `AttentionSpec`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Float

from jaxlm.ops.attention.request import Request
from jaxlm.ops.attention.spec import AttentionSpec

# The kernel works on tiles of 128 lanes.
LANES = 128
# Queries and keys that are in fast memory together, at most; half as many of wider
# heads, since a TPU v4 has no room for more.
BLOCK = 512
WIDE = 256
# The index of blocks lies in the scalar memory; the compiler took this many.
MOST_BLOCKS = 509 * 509


def declines(request: Request) -> str | None:
    """Why splash attention cannot do this, or None."""
    T, S = request.num_queries, request.num_keys
    mask = request.spec.mask
    if request.platform != "tpu":
        return "needs a TPU"
    if request.dtype not in (jnp.bfloat16, jnp.float32):
        return f"no {request.dtype}"
    if request.lse:
        return "no log-sum-exp with a gradient"
    if mask.query_positions is not None:
        return "no positions of queries"
    if T % LANES or S % LANES:
        return f"lengths must be multiples of {LANES}"
    if request.head_dim > 2 * WIDE:
        return f"head_dim {request.head_dim} is over {2 * WIDE}"
    rows, columns = (_block(n, request.head_dim) for n in (T, S))
    if (T // rows) * (S // columns) > MOST_BLOCKS:
        return f"too many blocks at lengths {T} and {S}"
    # The kernel would divide by a sum of nothing.
    if mask.window is not None and T - mask.window >= S:
        return "the window leaves queries without keys"
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], None]:
    """Attention in q's dtype, which k and v have too; never the log-sum-exp.

    `interpret` runs the kernel as plain JAX, on any device.
    """
    kernel = _kernel(q.shape, k.shape[1], spec, interpret)
    # The kernel has no scale of its own.
    q = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    segments = None
    mask = spec.mask
    if mask.query_segments is not None:
        segments = splash_attention_kernel.SegmentIds(
            mask.query_segments, mask.key_segments
        )
    sinks = None if spec.sinks is None else _keep_dtype(spec.sinks)
    run = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    z_BNTH: Any = run(q_BNTH, k_BKSH, v_BKSH, segments, sinks)
    return z_BNTH.transpose(0, 2, 1, 3), None


@jax.custom_vjp
def _keep_dtype(sinks: Array) -> Array:
    """The sinks; before JAX 0.12 the kernel gives their gradient in q's dtype."""
    return sinks


_keep_dtype.defvjp(
    lambda sinks: (sinks, sinks), lambda sinks, grad: (grad.astype(sinks.dtype),)
)


def _block(length: int, head_dim: int) -> int:
    """The largest block of whole tiles that cuts a row into equal parts."""
    most = BLOCK if head_dim <= WIDE else BLOCK // 2
    return max(b for b in range(LANES, most + 1, LANES) if length % b == 0)


def _kernel(shape: tuple[int, ...], S: int, spec: AttentionSpec, interpret: bool):
    """The kernel for one row of a batch of queries of this shape, and S keys.

    Query head n takes key head n // (N / K).
    """
    _, T, N, H = shape
    right = 0 if spec.mask.causal else None
    if right is None and spec.mask.window is None:
        mask = splash_attention_mask.FullMask((T, S))
    else:
        left = None if spec.mask.window is None else spec.mask.window - 1
        mask = _Band((T, S), (left, right), 0)
    rows, columns = _block(T, H), _block(S, H)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=blocks,
        attn_logits_soft_cap=spec.soft_cap,
        interpret=interpret,
    )


class _Band(splash_attention_mask.LocalMask):
    """Keys at most `left` positions before and `right` after the query; None: no limit.

    The kernel's set-up asks for every block of the mask. Most are all visible or all
    hidden, which their corners tell: computing them took seconds at 32k tokens.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (
            range(*part.indices(length))
            for part, length in zip(index, self.shape, strict=True)
        )
        left, right = (np.inf if n is None else n for n in self.window_size)
        # How far the query lies after the key, at least and at most.
        least, most = rows[0] - columns[-1], rows[-1] - columns[0]
        shape = (len(rows), len(columns))
        if least > left or most < -right:
            return np.zeros(shape, bool)
        if most <= left and least >= -right:
            return np.ones(shape, bool)
        return super().__getitem__(index)
