"""Blockwise attention in plain XLA: no [T, S] matrix, forward or backward.

Loops over blocks of queries and keys with an online softmax (Milakov and Gimelshein
2018, arXiv:1805.02867); the backward pass recomputes the probabilities from the saved
log-sum-exp. Skips blocks that the causal mask or the window hides completely.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.ops.attention import online_softmax
from jaxlm.ops.attention.flash import FlashKernels, flash_attention
from jaxlm.ops.attention.reference import join_heads
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Mask, Tokens
from jaxlm.ops.attention.tuning.tuning_cache import measured, settings_key
from jaxlm.ops.layout import reshape


@dataclass(frozen=True)
class BlockedSettings:
    """The block size, which `jaxlm tune attention` can measure."""

    block: int = 256
    """Tokens per block of queries, and per block of keys."""


def settings_for(q: Array) -> BlockedSettings:
    """Returns the settings measured for such queries, else the default."""
    return measured(settings_key("xla", q), BlockedSettings())


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: BlockedSettings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention with O(T * block) memory; T and S need not be multiples of the block.

    Returns:
      The result in q's dtype, and the log-sum-exp of the scores, sinks included, f32.
    """
    return flash_attention(kernels(q, spec, settings), q, k, v, spec)


def kernels(
    q: Array, spec: AttentionSpec, settings: BlockedSettings | None = None
) -> FlashKernels:
    """Returns the kernels for such queries."""
    return FlashKernels(_forward, backward, settings or settings_for(q))


def _in_blocks(q, k, v, mask: Mask, block: int):
    """Transposes and pads to whole blocks: q [B K G T H], k, v [B K S H], the mask."""
    q_BKGTH = _grouped(q, k.shape[2])
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k, v))
    pad = partial(_pad, block=block)
    mask = jax.tree.map(lambda x: pad(x, 1), mask)
    return pad(q_BKGTH, 3), pad(k_BKSH, 2), pad(v_BKSH, 2), mask


def _grouped(x: Float[Array, "B T N H"], K: int) -> Float[Array, "B K G T H"]:
    B, T, N, H = x.shape
    x = reshape(x, (B, T, K, N // K, H), (0, 1, 2, None, 3))
    return x.transpose(0, 2, 3, 1, 4)


def _ungrouped(x: Float[Array, "B K G T H"], length: int) -> Float[Array, "B _ N H"]:
    """Inverse of `_grouped`; keeps the first `length` queries."""
    B, K, G, _, H = x.shape
    x = x[:, :, :, :length].transpose(0, 3, 1, 2, 4)
    return reshape(x, (B, length, K * G, H), (0, 1, 2, 4))


def _pad(x: Array, axis: int, block: int) -> Array:
    missing = -x.shape[axis] % block
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def _block(x: Array, i: Int[Array, ""], axis: int, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _key_range(mask: Mask, i, num_blocks: int, block: int):
    """Returns the first key block that query block i can see, and one past the last."""
    first, last = i * block, (i + 1) * block - 1
    if mask.query_positions is not None:
        positions = _block(mask.query_positions, i, 1, block)
        first, last = positions.min(), positions.max()
    low, high = 0, num_blocks
    if mask.causal:
        high = jnp.clip(last // block + 1, 0, num_blocks)
    if mask.window is not None:
        low = jnp.maximum((first - mask.window + 1) // block, 0)
    return low, high


def _scores(q_i, k_j, spec: AttentionSpec, i, j, block: int, num_keys: int):
    """Scores of a pair of blocks [B, K, G, block, block], and d scores / d (q k^T)."""
    raw = _f32("BKGTH,BKSH->BKGTS", q_i, k_j)
    scores = online_softmax.scores(raw, spec.scale, spec.soft_cap)
    slope = online_softmax.slope(scores, spec.scale, spec.soft_cap)
    mask = spec.mask
    positions = (i * block + jnp.arange(block))[None]
    if mask.query_positions is not None:
        positions = _block(mask.query_positions, i, 1, block)
    queries = Tokens(positions)
    keys = Tokens((j * block + jnp.arange(block))[None])
    if mask.query_segments is not None:
        queries = Tokens(positions, _block(mask.query_segments, i, 1, block))
        keys = keys._replace(segments=_block(mask.key_segments, j, 1, block))
    allowed = mask.pairs(queries, keys, num_keys if num_keys % block else None)
    return online_softmax.hide(scores, allowed[:, None, None]), slope


def _forward(q, k, v, spec: AttentionSpec, settings: BlockedSettings):
    """See `flash.FlashKernels`."""
    block, num_queries, num_keys = settings.block, q.shape[1], k.shape[1]
    q, k, v, mask = _in_blocks(q, k, v, spec.mask, block)
    spec = replace(spec, mask=mask)
    T, S = q.shape[3], k.shape[2]
    sinks = None
    if spec.sinks is not None:
        sinks = spec.sinks.astype(jnp.float32)
        sinks = reshape(sinks, (*q.shape[1:3], 1), (0, None, None))

    def query_block(i):
        q_i = _block(q, i, 3, block)

        def key_block(j, carry):
            m, l, acc = carry
            k_j, v_j = _block(k, j, 2, block), _block(v, j, 2, block)
            scores, _ = _scores(q_i, k_j, spec, i, j, block, num_keys)
            m_new = jnp.maximum(m, scores.max(axis=-1))
            p = jnp.exp(scores - m_new[..., None])
            alpha = jnp.exp(m - m_new)
            part = _f32("BKGTS,BKSH->BKGTH", p.astype(v.dtype), v_j)
            acc = acc * alpha[..., None] + part
            return m_new, l * alpha + p.sum(axis=-1), acc

        # zeros_like keeps the sharding of q.
        zeros = jnp.zeros_like(q_i, dtype=jnp.float32)
        row = zeros[..., 0]
        start = (row + MASKED, row, zeros)
        low, high = _key_range(mask, i, S // block, block)
        m, l, acc = jax.lax.fori_loop(low, high, key_block, start)
        factor, lse = online_softmax.finish(m, l, sinks)
        return (acc * factor[..., None]).astype(q.dtype), lse

    z, lse = jax.lax.map(query_block, jnp.arange(T // block))
    z, lse = _join(z, 3), _join(lse, 3)
    return _ungrouped(z, num_queries), join_heads(lse[..., :num_queries])


def _join(blocks: Array, axis: int) -> Array:
    """Joins blocks: [n, ..., block, ...] -> [..., n * block, ...], at `axis`."""
    x = jnp.moveaxis(blocks, 0, axis)
    before, after = range(axis), range(axis + 2, x.ndim)
    size = x.shape[axis] * x.shape[axis + 1]
    shape = (*x.shape[:axis], size, *x.shape[axis + 2 :])
    return reshape(x, shape, (*before, None, *after))


def backward(q, k, v, spec: AttentionSpec, lse, delta, dz, settings: BlockedSettings):
    """See `flash.FlashKernels`."""
    block, T, S, K = settings.block, q.shape[1], k.shape[1], k.shape[2]
    dtypes = q.dtype, k.dtype, v.dtype
    q, k, v, mask = _in_blocks(q, k, v, spec.mask, block)
    spec = replace(spec, mask=mask)
    dz = _pad(_grouped(dz, K), 3, block)
    # A huge log-sum-exp makes the probabilities of padding queries 0.
    lse, delta = (_grouped_rows(x, K) for x in (lse, delta))
    missing = q.shape[3] - T
    lse = jnp.pad(lse, ((0, 0),) * 3 + ((0, missing),), constant_values=-MASKED)
    delta = _pad(delta, 3, block)
    key_blocks = k.shape[2] // block

    def query_block(carry, i):
        q_i, g_i, lse_i, delta_i = (_block(x, i, 3, block) for x in (q, dz, lse, delta))

        def key_block(j, carry):
            dq_i, dk, dv = carry
            k_j, v_j = _block(k, j, 2, block), _block(v, j, 2, block)
            scores, slope = _scores(q_i, k_j, spec, i, j, block, S)
            probs = jnp.exp(scores - lse_i[..., None])
            dprobs = _f32("BKGTH,BKSH->BKGTS", g_i, v_j)
            dscores = online_softmax.dscores(probs, dprobs, delta_i[..., None], slope)
            dscores = dscores.astype(q.dtype)
            dq_i = dq_i + _f32("BKGTS,BKSH->BKGTH", dscores, k_j)
            dk = _add(dk, _f32("BKGTS,BKGTH->BKSH", dscores, q_i), j, block)
            probs = probs.astype(dz.dtype)
            dv = _add(dv, _f32("BKGTS,BKGTH->BKSH", probs, g_i), j, block)
            return dq_i, dk, dv

        dk, dv = carry
        low, high = _key_range(mask, i, key_blocks, block)
        start = (jnp.zeros_like(q_i, dtype=jnp.float32), dk, dv)
        dq_i, dk, dv = jax.lax.fori_loop(low, high, key_block, start)
        return (dk, dv), dq_i

    start = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(query_block, start, jnp.arange(q.shape[3] // block))
    dk, dv = (x[:, :, :S].transpose(0, 2, 1, 3) for x in (dk, dv))
    grads = (_ungrouped(_join(dq, 3), T), dk, dv)
    return tuple(x.astype(dtype) for x, dtype in zip(grads, dtypes, strict=True))


def _grouped_rows(x: Float[Array, "B N T"], K: int) -> Float[Array, "B K G T"]:
    B, N, T = x.shape
    return reshape(x, (B, K, N // K, T), (0, 1, None, 2))


def _f32(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _add(x: Array, part: Array, j, block: int) -> Array:
    old = _block(x, j, 2, block)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, j * block, 2)
