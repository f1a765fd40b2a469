"""Attention: the specification and the plain reference.

`AttentionSpec` says everything that decides the result. The reference reads it off
literally and is the definition; faster versions (`dense.py`, `blocked.py`, `pallas/`)
are proven against it, and `dispatch.py` picks one. Each takes (q, k, v, spec) and
returns the result and the log-sum-exp.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Num

from jaxlm.ops.attention.mask import attention_mask
from jaxlm.ops.layout import reshape

# Finite, so that a row in which everything is masked gives no NaN.
MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionSpec:
    """What attention computes, apart from its queries, keys and values."""

    scale: float = field(metadata={"static": True})
    """Factor of the scores."""
    causal: bool = field(default=True, metadata={"static": True})
    """Hide keys after the query."""
    window: int | None = field(default=None, metadata={"static": True})
    """Tokens that a query sees, itself included; None: all."""
    soft_cap: float | None = field(default=None, metadata={"static": True})
    """Scores become cap * tanh(scores / cap)."""
    # While JAX takes this tree apart and rebuilds it, a leaf may be anything: shapes
    # are given below, but not checked.
    sinks: Any = None
    """[N]: a logit for each head that takes part in the softmax and gives nothing."""
    query_segments: Any = None
    """[B, T] int32: attention stays inside a segment (with key_segments)."""
    key_segments: Any = None
    """[B, S] int32."""
    query_index: Any = None
    """[B, T] int32: place of each query among the keys; None: 0 to T - 1."""
    key_length: Any = None
    """[B] int32: keys from this place on are hidden; None: all S are there."""
    key_scale: Any = None
    """[B, S, K] f32, with `value_scale`: keys and values are int8 and stand for their
    product with it; see `quantize`."""
    value_scale: Any = None
    """[B, S, K] f32."""


def quantize(
    x: Float[Array, "*B H"],
) -> tuple[Int8[Array, "*B H"], Float[Array, "*B"]]:
    """Numbers rounded to int8, and the scale of each row: x is near int8 * scale.

    Symmetric, by the greatest magnitude of the row; a row of zeros has scale 1.
    """
    x = x.astype(jnp.float32)
    greatest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(greatest > 0, greatest / 127.0, 1.0)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def dequantize(
    k: Array, v: Array, spec: AttentionSpec, dtype: Any
) -> tuple[Array, Array, AttentionSpec]:
    """Keys and values as numbers of `dtype`, and the spec without their scales."""
    if spec.key_scale is None:
        return k, v, spec
    k = (k.astype(jnp.float32) * spec.key_scale[..., None]).astype(dtype)
    v = (v.astype(jnp.float32) * spec.value_scale[..., None]).astype(dtype)
    return k, v, replace(spec, key_scale=None, value_scale=None)


def attention_scores(
    q: Float[Array, "B T N H"], k: Num[Array, "B S K H"], spec: AttentionSpec
) -> Float[Array, "B K G T S"]:
    """Scores after scale and soft cap, `MASKED` where hidden, f32.

    Query head n is served by key head n // G.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q_BTKGH = reshape(q, (B, T, K, N // K, H), (0, 1, 2, None, 3))
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k, preferred_element_type=jnp.float32
    )
    scores = scores * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    index = jnp.arange(T)[None] if spec.query_index is None else spec.query_index
    mask = attention_mask(
        index,
        jnp.arange(S),
        causal=spec.causal,
        window=spec.window,
        query_segments=spec.query_segments,
        key_segments=spec.key_segments,
        key_length=spec.key_length,
    )
    return jnp.where(mask[:, None, None], scores, MASKED)


def attention_lse(
    scores: Float[Array, "B K G T S"], spec: AttentionSpec
) -> Float[Array, "B K G T"]:
    """Log-sum-exp of the scores of each query, the sink included, f32."""
    lse = jax.nn.logsumexp(scores, axis=-1)
    if spec.sinks is not None:
        K, G = scores.shape[1:3]
        sinks = spec.sinks.astype(jnp.float32)
        lse = jnp.logaddexp(lse, reshape(sinks, (K, G, 1), (0, None, None)))
    return lse


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention by its definition; holds all scores, [B, N, T, S] in f32.

    Returns:
      The result in q's dtype, and the log-sum-exp of the scores, sink included, f32.
    """
    k, v, spec = dequantize(k, v, spec, q.dtype)
    scores = attention_scores(q, k, spec)
    lse = attention_lse(scores, spec)
    if spec.sinks is None:
        probs = jax.nn.softmax(scores, axis=-1)
    else:
        probs = jnp.exp(scores - lse[..., None])
    z = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        probs.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    z = reshape(z, q.shape, (0, 1, 2, 4)).astype(q.dtype)
    return z, join_heads(lse)


def join_heads(lse: Float[Array, "B K G T"]) -> Float[Array, "B N T"]:
    """One row for each query head."""
    B, K, G, T = lse.shape
    return reshape(lse, (B, K * G, T), (0, 1, 3))
