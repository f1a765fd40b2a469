"""The online softmax and its gradient: the formulas that all kernels share.

Milakov and Gimelshein 2018 (arXiv:1805.02867), in the notation of FlashAttention: for
each query, m is the maximum score so far, l the sum of exp(score - m), and acc the sum
of exp(score - m) * value.

These are plain functions of one block, in f32. Arguments broadcast against the block of
scores, in either layout: [queries, keys] or [keys, queries]. `raw` is q k^T before the
scale.
"""

import math
from typing import Any

import jax.numpy as jnp

from jaxlm.ops.attention.spec import MASKED

# GPUs have an instruction for powers of two: exp(x) is 2 ** (x LOG2_E).
LOG2_E = math.log2(math.e)


def scores(raw: Any, scale: float, soft_cap: float | None) -> Any:
    """Applies the scale and the soft cap."""
    scaled = raw * scale
    return scaled if soft_cap is None else soft_cap * jnp.tanh(scaled / soft_cap)


def scores_base_2(raw: Any, scale: float, soft_cap: float | None) -> Any:
    """Computes the scores times `LOG2_E`.

    Without a soft cap that is one multiplication, which becomes one instruction with
    the subtraction that follows.
    """
    if soft_cap is None:
        return raw * (scale * LOG2_E)
    return scores(raw, scale, soft_cap) * LOG2_E


def slope(capped: Any, scale: float, soft_cap: float | None) -> Any:
    """Computes d scores / d raw from the scores."""
    if soft_cap is None:
        return scale
    tanh = capped / soft_cap
    return scale * (1.0 - tanh * tanh)


def hide(x: Any, allowed: Any) -> Any:
    """Sets scores to `MASKED` where not allowed; `allowed` None hides nothing."""
    return x if allowed is None else jnp.where(allowed, x, MASKED)


def finish(m: Any, l: Any, sink: Any = None) -> tuple[Any, Any]:
    """Finishes an online softmax after the last block.

    Args:
      m: the maximum score of each query, `MASKED` if it saw no key.
      l: the sum of exp(score - m).
      sink: a logit that joins the sum, or None.

    Returns:
      The factor that turns acc into the result, and the log-sum-exp. For a query that
      sees no key, they are 0, and the sink or `MASKED`.
    """
    seen = m > MASKED / 2
    lse = jnp.where(seen, m + jnp.log(jnp.where(seen, l, 1.0)), MASKED)
    if sink is not None:
        greater = jnp.maximum(lse, sink)
        lse = greater + jnp.log(jnp.exp(lse - greater) + jnp.exp(sink - greater))
    return jnp.where(seen, jnp.exp(m - lse), 0.0), lse


def dscores(probs: Any, dprobs: Any, delta: Any, slope: Any) -> Any:
    """Computes the gradient of `raw` from the probabilities and their gradient.

    Args:
      delta: for each query, the sum over keys of probs * dprobs, minus the gradient of
        the log-sum-exp.
    """
    return probs * (dprobs - delta) * slope
