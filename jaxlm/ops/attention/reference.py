"""Attention by its definition, in plain JAX. Every implementation must equal this.

Each implementation takes (q, k, v, spec) and returns the result and the log-sum-exp of
the scores; `dispatch.py` chooses one.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.spec import MASKED, AttentionSpec, dequantize
from jaxlm.ops.layout import reshape
from jaxlm.ops.probing.probe import Probe

logger = logging.getLogger(__name__)


def attention_scores(
    q: Float[Array, "B T N H"], k: Num[Array, "B S K H"], spec: AttentionSpec
) -> Float[Array, "B K G T S"]:
    """Computes scores, f32: after scale and soft cap, and `MASKED` where hidden.

    Query head n uses key head n // G.
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
    return jnp.where(spec.mask.array(T, S)[:, None, None], scores, MASKED)


def attention_lse(
    scores: Float[Array, "B K G T S"], spec: AttentionSpec
) -> Float[Array, "B K G T"]:
    """Computes the log-sum-exp of each query's scores, sinks included, f32."""
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
    """Attention by its definition; keeps all scores, [B, N, T, S] in f32.

    Returns:
      The result in q's dtype, and the log-sum-exp of the scores, sinks included, f32.
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


def probed_attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "B S K H"],
    v: Num[Array, "B S K H"],
    spec: AttentionSpec,
    probe: Probe,
) -> Float[Array, "B T N H"]:
    """The reference, with scores, log-sum-exp and probabilities as sites.

    For edits of these: the fast implementations keep none of them.
    """
    _log_once()
    k, v, spec = dequantize(k, v, spec, q.dtype)
    B, K, heads = len(q), k.shape[2], q.shape[2]
    grouped = (B, K, heads // K)

    def edit(site: str, x: Array) -> Array:
        x = probe(site, join_heads(x))
        return reshape(x, (*grouped, *x.shape[2:]), (0, 1, None, *range(2, x.ndim)))

    scores = edit("attn_scores", attention_scores(q, k, spec))
    lse = edit("attn_lse", attention_lse(scores, spec))
    probs = edit("attn_probs", jnp.exp(scores - lse[..., None]))
    z = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        probs.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return reshape(z, q.shape, (0, 1, 2, 4)).astype(q.dtype)


@functools.cache
def _log_once() -> None:
    logger.warning(
        "attention runs in the reference, since an edit changes its scores or "
        "probabilities"
    )


def join_heads(x: Float[Array, "B K G T *S"]) -> Float[Array, "B N T *S"]:
    """Merges key heads and groups into query heads."""
    B, K, G, *rest = x.shape
    return reshape(x, (B, K * G, *rest), (0, 1, *range(3, x.ndim)))
