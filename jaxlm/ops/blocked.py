"""Memory-lean attention in plain XLA: no [T, S] matrix, forward or backward.

Queries and keys are taken in blocks; the softmax is kept online (Milakov and
Gimelshein 2018, arXiv:1805.02867) and the backward pass computes the scores again from
the saved log-sum-exp (Dao et al. 2022, arXiv:2205.14135). Blocks that the causal mask
or the window hide whole are skipped.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.ops.attention import MASKED, AttentionSpec
from jaxlm.ops.layout import reshape
from jaxlm.ops.mask import attention_mask

BLOCK = 256


def blocked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
) -> Float[Array, "B T N H"]:
    """Attention with O(T * BLOCK) memory. T and S need not be multiples of BLOCK."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q_BKGTH = reshape(q, (B, T, K, N // K, H), (0, 1, 2, None, 3))
    q_BKGTH = q_BKGTH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k, v))
    q_BKGTH = _pad(q_BKGTH, 3)
    k_BKSH, v_BKSH = _pad(k_BKSH, 2), _pad(v_BKSH, 2)
    if spec.query_segments is not None:
        spec = replace(
            spec,
            query_segments=_pad(spec.query_segments, 1),
            key_segments=_pad(spec.key_segments, 1),
        )
    if spec.query_index is not None:
        spec = replace(spec, query_index=_pad(spec.query_index, 1))
    if spec.key_length is None and S % BLOCK:
        spec = replace(spec, key_length=jnp.full((1,), S, jnp.int32))
    z = _blocked(q_BKGTH, k_BKSH, v_BKSH, spec)[:, :, :, :T]
    return reshape(z.transpose(0, 3, 1, 2, 4), (B, T, N, H), (0, 1, 2, 4))


def _pad(x: Array, axis: int) -> Array:
    missing = -x.shape[axis] % BLOCK
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def _block(x: Array, i: Int[Array, ""], axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis)


def _key_blocks(spec: AttentionSpec, i, num_blocks: int):
    """First and last + 1 of the key blocks that query block i can see."""
    if spec.query_index is not None:
        return 0, num_blocks
    high = jnp.minimum(i + 1, num_blocks) if spec.causal else num_blocks
    low = 0
    if spec.window is not None:
        low = jnp.maximum((i * BLOCK - spec.window + 1) // BLOCK, 0)
    return low, high


def _scores(q_i, k_j, spec: AttentionSpec, i, j):
    """Scores of one pair of blocks [B, K, G, BLOCK, BLOCK], and d score / d (q k)."""
    raw = jnp.einsum("BKGTH,BKSH->BKGTS", q_i, k_j, preferred_element_type=jnp.float32)
    scores = raw * spec.scale
    slope = spec.scale
    if spec.soft_cap is not None:
        tanh = jnp.tanh(scores / spec.soft_cap)
        scores, slope = spec.soft_cap * tanh, spec.scale * (1 - tanh * tanh)
    if spec.query_index is None:
        index = (i * BLOCK + jnp.arange(BLOCK))[None]
    else:
        index = _block(spec.query_index, i, 1)
    segments = spec.query_segments is not None
    mask = attention_mask(
        index,
        j * BLOCK + jnp.arange(BLOCK),
        causal=spec.causal,
        window=spec.window,
        query_segments=_block(spec.query_segments, i, 1) if segments else None,
        key_segments=_block(spec.key_segments, j, 1) if segments else None,
        key_length=spec.key_length,
    )
    mask = mask[:, None, None]
    return jnp.where(mask, scores, MASKED), jnp.where(mask, slope, 0.0)


def _forward(q, k, v, spec: AttentionSpec):
    """z in q's dtype and the log-sum-exp [B, K, G, T] in f32."""
    T, S = q.shape[3], k.shape[2]

    def query_block(i):
        q_i = _block(q, i, 3)

        def key_block(j, carry):
            total, top, weight = carry
            scores, _ = _scores(q_i, _block(k, j, 2), spec, i, j)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            probs = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            part = jnp.einsum(
                "BKGTS,BKSH->BKGTH",
                probs.astype(v.dtype),
                _block(v, j, 2),
                preferred_element_type=jnp.float32,
            )
            total = total * shrink[..., None] + part
            return total, new_top, weight * shrink + probs.sum(axis=-1)

        # Zeros made from q carry its sharding.
        zeros = jnp.zeros_like(q_i, dtype=jnp.float32)
        row = zeros[..., 0]
        start = (zeros, row + MASKED, row)
        low, high = _key_blocks(spec, i, S // BLOCK)
        total, top, weight = jax.lax.fori_loop(low, high, key_block, start)
        lse = top + jnp.log(weight)
        if spec.sinks is not None:
            lse = jnp.logaddexp(lse, _sinks(spec, q))
        z = total * jnp.exp(top - lse)[..., None]
        return z.astype(q.dtype), lse

    z, lse = jax.lax.map(query_block, jnp.arange(T // BLOCK))
    return _join(z, 3), _join(lse, 3)


def _sinks(spec: AttentionSpec, q) -> Float[Array, "K G 1"]:
    assert spec.sinks is not None
    sinks = spec.sinks.astype(jnp.float32)
    return reshape(sinks, (*q.shape[1:3], 1), (0, None, None))


def _join(blocks: Array, axis: int) -> Array:
    """[n, ..., BLOCK, ...] -> [..., n * BLOCK, ...] along `axis` of the result."""
    x = jnp.moveaxis(blocks, 0, axis)
    before, after = range(axis), range(axis + 2, x.ndim)
    size = x.shape[axis] * x.shape[axis + 1]
    shape = (*x.shape[:axis], size, *x.shape[axis + 2 :])
    return reshape(x, shape, (*before, None, *after))


@jax.custom_vjp
def _blocked(q, k, v, spec):
    return _forward(q, k, v, spec)[0]


def _blocked_forward(q, k, v, spec):
    z, lse = _forward(q, k, v, spec)
    return z, (q, k, v, spec, z, lse)


def _blocked_backward(residuals, g):
    q, k, v, spec, z, lse = residuals
    # delta is the part of each score's gradient that the softmax subtracts.
    delta = jnp.sum(g.astype(jnp.float32) * z.astype(jnp.float32), axis=-1)
    num_keys = k.shape[2] // BLOCK

    def query_block(carry, i):
        q_i, g_i = _block(q, i, 3), _block(g, i, 3)
        lse_i, delta_i = _block(lse, i, 3), _block(delta, i, 3)

        def key_block(j, carry):
            dq_i, dk, dv = carry
            k_j, v_j = _block(k, j, 2), _block(v, j, 2)
            scores, slope = _scores(q_i, k_j, spec, i, j)
            probs = jnp.exp(scores - lse_i[..., None])
            dprobs = _f32("BKGTH,BKSH->BKGTS", g_i, v_j)
            dscores = probs * (dprobs - delta_i[..., None]) * slope
            dscores = dscores.astype(q.dtype)
            dq_i = dq_i + _f32("BKGTS,BKSH->BKGTH", dscores, k_j)
            dk = _add(dk, _f32("BKGTS,BKGTH->BKSH", dscores, q_i), j)
            dv = _add(dv, _f32("BKGTS,BKGTH->BKSH", probs.astype(g.dtype), g_i), j)
            return dq_i, dk, dv

        dk, dv = carry
        low, high = _key_blocks(spec, i, num_keys)
        start = (jnp.zeros_like(q_i, dtype=jnp.float32), dk, dv)
        dq_i, dk, dv = jax.lax.fori_loop(low, high, key_block, start)
        return (dk, dv), dq_i

    start = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(query_block, start, jnp.arange(q.shape[3] // BLOCK))
    dq = _join(dq, 3)
    dspec = jax.tree.map(lambda x: None, spec)
    if spec.sinks is not None:
        share = jnp.exp(_sinks(spec, q) - lse)
        dsinks = -jnp.sum(share * delta, axis=(0, 3))
        dsinks = reshape(dsinks, spec.sinks.shape, (0,))
        dspec = replace(dspec, sinks=dsinks.astype(spec.sinks.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dspec


def _f32(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _add(x: Array, part: Array, j) -> Array:
    old = _block(x, j, 2)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, j * BLOCK, 2)


_blocked.defvjp(_blocked_forward, _blocked_backward)
