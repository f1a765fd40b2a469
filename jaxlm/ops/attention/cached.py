"""Attention of a few queries over a cache: visits only blocks that hold visible keys.

A cache has room for more tokens than it holds. The number of blocks is found while the
program runs, so the cost follows the longest text of the batch, not the room. int8 keys
and values are multiplied by their scales block by block.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention import blocked, online_softmax
from jaxlm.ops.attention.flash import FlashKernels, flash_attention
from jaxlm.ops.attention.reference import join_heads
from jaxlm.ops.attention.request import AttentionRequest
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Tokens, dequantize
from jaxlm.ops.layout import reshape

MAX_QUERIES = 16
# Keys of a block; the fastest from 1 to 8 rows of 128 to 2,048 keys on a CPU.
BLOCK = 128


def declines(request: AttentionRequest) -> str | None:
    """Returns why `cached_attention` cannot run the request; None: it can."""
    if request.spec.mask.query_positions is None:
        return "only for queries at given positions"
    if request.num_queries > MAX_QUERIES:
        return f"only for up to {MAX_QUERIES} queries"
    return None


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: int = BLOCK,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention with an online softmax over blocks of keys.

    Args:
      settings: keys of a block.

    Returns:
      The result in q's dtype, and the log-sum-exp of the scores, sinks included, f32.
    """
    return flash_attention(FlashKernels(_forward, _backward, settings), q, k, v, spec)


def _forward(q, k, v, spec: AttentionSpec, settings: int):
    """See `flash.FlashKernels`."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    block = min(settings, S)
    mask, num_blocks = spec.mask, -(-S // block)
    queries = mask.queries(T)
    first, last = 0, num_blocks
    if mask.causal:
        last = jnp.clip(jnp.max(queries.positions) // block + 1, 1, num_blocks)
    if mask.window is not None:
        low = jnp.min(queries.positions) - mask.window + 1
        first = jnp.clip(low // block, 0, num_blocks - 1)
    q_BTKGH = reshape(q, (B, T, K, N // K, H), (0, 1, 2, None, 3))

    def key_block(j, carry):
        m, l, acc = carry
        # The last block may overlap the one before it.
        start = jnp.minimum(j * block, S - block)

        def part(x: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)

        scales = {"key_scale": spec.key_scale, "value_scale": spec.value_scale}
        own = replace(spec, **jax.tree.map(part, scales))
        k_j, v_j, _ = dequantize(part(k), part(v), own, q.dtype)
        raw = _f32("BTKGH,BSKH->BKGTS", q_BTKGH, k_j)
        scores = online_softmax.scores(raw, spec.scale, spec.soft_cap)
        positions = start + jnp.arange(block)[None]
        segments = mask.key_segments
        keys = Tokens(positions, None if segments is None else part(segments))
        allowed = mask.pairs(queries, keys) & (positions >= j * block)[:, None]
        scores = online_softmax.hide(scores, allowed[:, None, None])
        m_new = jnp.maximum(m, scores.max(axis=-1))
        p, alpha = jnp.exp(scores - m_new[..., None]), jnp.exp(m - m_new)
        z = _f32("BKGTS,BSKH->BKGTH", p.astype(v_j.dtype), v_j)
        return m_new, l * alpha + p.sum(axis=-1), acc * alpha[..., None] + z

    # Keeps the sharding of q.
    zeros = jnp.zeros_like(q_BTKGH, dtype=jnp.float32).transpose(0, 2, 3, 1, 4)
    start = (zeros[..., 0] + MASKED, zeros[..., 0], zeros)
    m, l, acc = jax.lax.fori_loop(first, last, key_block, start)
    sinks = None
    if spec.sinks is not None:
        sinks = spec.sinks.astype(jnp.float32)
        sinks = reshape(sinks, (K, N // K, 1), (0, None, None))
    factor, lse = online_softmax.finish(m, l, sinks)
    z = (acc * factor[..., None]).transpose(0, 3, 1, 2, 4)
    return reshape(z, q.shape, (0, 1, 2, 4)).astype(q.dtype), join_heads(lse)


def _backward(q, k, v, spec: AttentionSpec, lse, delta, dz, settings: int):
    """See `flash.FlashKernels`."""
    return blocked.backward(
        *(q, k, v, spec, lse, delta, dz), blocked.BlockedSettings(settings)
    )


def _f32(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
