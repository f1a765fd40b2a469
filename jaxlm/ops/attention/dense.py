"""Attention for short sequences: keeps all probabilities, in the compute dtype.

Same result as the reference, with a backward pass made for matrix units: it saves the
unnormalized probabilities, the gradients of keys and values each contract two
dimensions (the only form in which XLA:CPU runs a batched bfloat16 matmul), and query
blocks skip the key blocks that the causal mask or the window hides completely.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.attention.reference import join_heads
from jaxlm.ops.attention.request import AttentionRequest
from jaxlm.ops.attention.spec import MASKED, AttentionSpec, Mask
from jaxlm.ops.attention.tuning.tuning_cache import measured, settings_key
from jaxlm.ops.layout import reshape


@dataclass(frozen=True)
class DenseSettings:
    """The block size, which `jaxlm tune attention` can measure."""

    block: int = 128
    """Queries per block. Smaller blocks skip more keys, but their matrices are smaller;
    128 was the fastest at 256 tokens."""


def settings_for(q: Array) -> DenseSettings:
    """Returns the settings measured for such queries, else the default."""
    return measured(settings_key("dense", q), DenseSettings())


def declines(request: AttentionRequest) -> str | None:
    """Returns why `dense_attention` cannot run the request; None: it can."""
    return None if request.spec.soft_cap is None else "has no soft cap"


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: AttentionSpec,
    *,
    settings: DenseSettings | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention that keeps [B, N, T, S] probabilities in q's dtype; no soft cap.

    Returns:
      The result in q's dtype, and the log-sum-exp of the scores, sinks included, f32.
    """
    assert spec.soft_cap is None
    settings = settings or settings_for(q)
    B, T, N, H = q.shape
    K = k.shape[2]
    scaled = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
    q_BTKGH = reshape(scaled, (B, T, K, N // K, H), (0, 1, 2, None, 3))
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k, v))
    z, lse = _dense(settings.block, q_BKGTH, k_BKSH, v_BKSH, spec)
    z = reshape(z.transpose(0, 3, 1, 2, 4), q.shape, (0, 1, 2, 4))
    return z, join_heads(lse)


def _blocks(num_queries: int, num_keys: int, mask: Mask, block: int):
    """Returns the slices of queries, each with the slice of keys that it may see."""
    square = num_queries == num_keys and mask.query_positions is None
    if not square or not mask.causal or num_queries % block:
        return [(slice(0, num_queries), slice(0, num_keys))]
    blocks = []
    for start in range(0, num_queries, block):
        low = 0
        if mask.window is not None:
            low = max(start - mask.window + 1, 0) // block * block
        blocks.append((slice(start, start + block), slice(low, start + block)))
    return blocks


def _bias(mask: Mask, rows: slice, keys: slice) -> Float[Array, "#B 1 1 T S"]:
    """0 where a query may attend to a key, `MASKED` elsewhere."""
    queries = jax.tree.map(lambda x: x[:, rows], mask.queries(rows.stop))
    columns = jax.tree.map(lambda x: x[:, keys], mask.keys(keys.stop))
    return jnp.where(mask.pairs(queries, columns), 0.0, MASKED)[:, None, None]


def _einsum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _forward(q, k, v, spec: AttentionSpec, block: int):
    """Returns z, the log-sum-exp, and for each block exp(scores - m) and 1 / l."""
    outs, lses, saved = [], [], []
    for rows, keys in _blocks(q.shape[3], k.shape[2], spec.mask, block):
        k_j, v_j = k[:, :, keys], v[:, :, keys]
        scores = _einsum("BKGTH,BKSH->BKGTS", q[:, :, :, rows], k_j)
        scores += _bias(spec.mask, rows, keys)
        m = scores.max(axis=-1, keepdims=True)
        # Without the barrier XLA:CPU recomputes the exponentials at each use.
        p = jax.lax.optimization_barrier(jnp.exp(scores - m).astype(q.dtype))
        # As a matmul, the sum reads the rounded p once, in the fast bfloat16 kernel.
        ones = jnp.ones((p.shape[-1], 16), q.dtype)
        l = _einsum("BKGTS,SE->BKGTE", p, ones)[..., :1]
        sink = None
        if spec.sinks is not None:
            sinks = spec.sinks.astype(jnp.float32)
            sinks = reshape(sinks, (*q.shape[1:3], 1, 1), (0, None, None, None))
            sink = jnp.exp(sinks - m)
            l += sink
        inverse = 1 / l
        z = _einsum("BKGTS,BKSH->BKGTH", p, v_j) * inverse
        outs.append(z.astype(q.dtype))
        lses.append((m + jnp.log(l))[..., 0])
        saved.append((p, inverse, None if sink is None else sink * inverse))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3), saved


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(block, q, k, v, spec):
    return _forward(q, k, v, spec, block)[:2]


def _dense_forward(block, q, k, v, spec):
    z, lse, saved = _forward(q, k, v, spec, block)
    return (z, lse), (q, k, v, spec, z, saved)


def _dense_backward(block, residuals, cotangents):
    q, k, v, spec, z, saved = residuals
    g, dlse = cotangents
    dk, dv = (jnp.zeros_like(x, dtype=jnp.float32) for x in (k, v))
    dqs, dsinks = [], []
    blocks = _blocks(q.shape[3], k.shape[2], spec.mask, block)
    for (rows, keys), (p, inverse, sink) in zip(blocks, saved, strict=True):
        q_i = q[:, :, :, rows]
        g_i = g[:, :, :, rows].astype(jnp.float32) * inverse
        # The gradient of the softmax subtracts this from each dprobs of a query.
        delta = jnp.sum(g_i * z[:, :, :, rows].astype(jnp.float32), -1, keepdims=True)
        delta -= inverse * dlse[:, :, :, rows, None]
        g_i = g_i.astype(q.dtype)
        dprobs = _einsum("BKGTH,BKSH->BKGTS", g_i, v[:, :, keys])
        dscores = (p.astype(jnp.float32) * (dprobs - delta)).astype(q.dtype)
        dscores = jax.lax.optimization_barrier(dscores)
        dqs.append(_einsum("BKGTS,BKSH->BKGTH", dscores, k[:, :, keys]))
        dk = dk.at[:, :, keys].add(_over_queries(dscores, q_i))
        dv = dv.at[:, :, keys].add(_over_queries(p, g_i))
        if sink is not None:
            dsinks.append(-jnp.sum(sink * delta / inverse, axis=(0, 3, 4)))
    dq = jnp.concatenate(dqs, axis=3)
    dspec = jax.tree.map(lambda x: None, spec)
    if spec.sinks is not None:
        total = reshape(sum(dsinks[1:], dsinks[0]), spec.sinks.shape, (0,))
        dspec = replace(dspec, sinks=total.astype(spec.sinks.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dspec


def _over_queries(
    a: Float[Array, "B K G T S"], b: Float[Array, "B K G T H"]
) -> Float[Array, "B K S H"]:
    """Contracts the queries and the heads of a group, in f32."""
    if a.shape[2] == 1 and a.shape[3] % 2 == 0:
        # Contract two dimensions even if a group has one head (see the top).
        B, K, _, T, S = a.shape
        kept = (0, 1, None, None, 4)
        a = reshape(a, (B, K, 2, T // 2, S), kept)
        b = reshape(b, (B, K, 2, T // 2, b.shape[-1]), kept)
    return _einsum("BKGTS,BKGTH->BKSH", a, b)


_dense.defvjp(_dense_forward, _dense_backward)
