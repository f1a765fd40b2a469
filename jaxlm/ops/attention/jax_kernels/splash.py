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

from jaxlm.ops.attention.request import AttentionRequest
from jaxlm.ops.attention.spec import AttentionSpec

# The kernel needs lengths in multiples of 128 lanes.
LANES = 128
# The segment of the padding up to there; those of texts are not negative.
PADDING_SEGMENT = -1
# The largest block of queries or keys in VMEM, and the largest of keys that is computed
# at once. Heads wider than WIDE, and float32, have half of it, to fit in VMEM.
BLOCK = 1024
COMPUTED = 512
WIDE = 128
# With up to this many blocks of keys one kernel computes all gradients, five products
# instead of seven. It writes a dq for each of them, in q's dtype.
FUSED_BLOCKS = 4
# The block index is in scalar memory; the compiler accepted this many blocks.
MAX_BLOCKS = 509 * 509


def declines(request: AttentionRequest) -> str | None:
    """Returns why splash attention cannot run the request; None: it can."""
    T, S, H = request.num_queries, request.num_keys, request.head_dim
    mask = request.spec.mask
    for applies, reason in (
        (request.platform != "tpu", "needs a TPU"),
        (request.dtype not in (jnp.bfloat16, jnp.float32), f"no {request.dtype}"),
        (request.lse, "no log-sum-exp with a gradient"),
        (mask.query_positions is not None, "no query positions"),
        # Equal lengths are padded.
        (
            T != S and (T % LANES or S % LANES),
            f"lengths must be equal, or multiples of {LANES}",
        ),
        (H > 512, f"head_dim {H} is over 512"),
    ):
        if applies:
            return reason
    T, S = (n + -n % LANES for n in (T, S))
    rows, columns = (_block(n, request.q) for n in (T, S))
    if (T // rows) * (S // columns) > MAX_BLOCKS:
        return f"too many blocks at lengths {T} and {S}"
    # The kernel would divide by an empty sum.
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
    """Attention in the common dtype of q, k and v; the log-sum-exp is always None.

    Args:
      interpret: run the kernel as plain JAX, on any device.
    """
    B, T = q.shape[:2]
    segment_ids: list[Any] = [spec.mask.query_segments, spec.mask.key_segments]
    missing = -T % LANES
    if missing:
        # Padding is a segment of its own, in which each query sees its own key. The
        # causal mask hides those keys too.
        if segment_ids[0] is None and not spec.mask.causal:
            segment_ids = [jnp.zeros((B, T), jnp.int32)] * 2
        segment_ids = [
            None if x is None else _pad(x, missing, PADDING_SEGMENT)
            for x in segment_ids
        ]
        q, k, v = (_pad(x, missing, 0) for x in (q, k, v))
    segments = None
    if segment_ids[0] is not None:
        segments = splash_attention_kernel.SegmentIds(*segment_ids)
    kernel = _kernel(q, k.shape[1], spec, interpret)
    # The kernel does not scale the scores.
    q = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    sinks = None if spec.sinks is None else _keep_dtype(spec.sinks)
    run = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    z_BNTH: Any = run(q_BNTH, k_BKSH, v_BKSH, segments, sinks)
    return z_BNTH.transpose(0, 2, 1, 3)[:, :T], None


def _pad(x: Array, missing: int, value: int) -> Array:
    """Pads axis 1 at its end."""
    widths = [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


@jax.custom_vjp
def _keep_dtype(sinks: Array) -> Array:
    """Casts the sinks' gradient to their dtype; before JAX 0.12 it has q's dtype."""
    return sinks


_keep_dtype.defvjp(
    lambda sinks: (sinks, sinks), lambda sinks, grad: (grad.astype(sinks.dtype),)
)


def _block(length: int, q: Array | jax.ShapeDtypeStruct) -> int:
    """Returns the largest block that fits and divides the length."""
    small = q.shape[-1] > WIDE or q.dtype == jnp.float32
    return _divisor(length, BLOCK // 2 if small else BLOCK)


def _divisor(length: int, largest: int) -> int:
    """Returns the largest multiple of `LANES`, up to `largest`, that divides it."""
    return max(b for b in range(LANES, largest + 1, LANES) if length % b == 0)


def _kernel(q: Array, S: int, spec: AttentionSpec, interpret: bool):
    """Makes the kernel for one batch row of such queries and S keys.

    Query head n uses key head n // (N / K).
    """
    _, T, N, _ = q.shape
    right = 0 if spec.mask.causal else None
    if right is None and spec.mask.window is None:
        mask = splash_attention_mask.FullMask((T, S))
    else:
        left = None if spec.mask.window is None else spec.mask.window - 1
        mask = _Band((T, S), (left, right), 0)
    rows, columns = _block(T, q), _block(S, q)
    computed = _divisor(columns, min(columns, COMPUTED))
    is_fused = S // columns <= FUSED_BLOCKS
    blocks = splash_attention_kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=computed,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=computed,
        block_q_dq=None if is_fused else rows,
        block_kv_dq=None if is_fused else columns,
        use_fused_bwd_kernel=is_fused,
    )
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=blocks,
        attn_logits_soft_cap=spec.soft_cap,
        interpret=interpret,
    )


class _Band(splash_attention_mask.LocalMask):
    """Keys at most `left` positions before and `right` after the query; None: no limit.

    The kernel's setup reads every block of the mask. Most are completely visible or
    hidden, as their corners show; computing them all took seconds at 32k tokens.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (
            range(*part.indices(length))
            for part, length in zip(index, self.shape, strict=True)
        )
        left, right = (np.inf if n is None else n for n in self.window_size)
        # The smallest and largest distance of a query after a key.
        least, most = rows[0] - columns[-1], rows[-1] - columns[0]
        shape = (len(rows), len(columns))
        if least > left or most < -right:
            return np.zeros(shape, bool)
        if most <= left and least >= -right:
            return np.ones(shape, bool)
        return super().__getitem__(index)
