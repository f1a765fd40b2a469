"""The softmax over blocks of keys, and its gradient: formulas that the kernels share.

Milakov and Gimelshein 2018 (arXiv:1805.02867), with the letters of FlashAttention: for
each query m is the greatest score so far, l the sum of exp(score - m), acc the sum of
exp(score - m) * value.

Plain functions of one block's numbers, f32. Arguments broadcast against a block of
scores, whichever way it lies: [queries, keys] or [keys, queries]. `raw` is q k^T before
the scale.
"""

from typing import Any

import jax.numpy as jnp

from jaxlm.ops.attention.spec import MASKED


def scores(raw: Any, scale: float, soft_cap: float | None) -> Any:
    """Scores after scale and soft cap."""
    scaled = raw * scale
    return scaled if soft_cap is None else soft_cap * jnp.tanh(scaled / soft_cap)


def slope(capped: Any, scale: float, soft_cap: float | None) -> Any:
    """d scores / d raw, from the scores."""
    if soft_cap is None:
        return scale
    tanh = capped / soft_cap
    return scale * (1.0 - tanh * tanh)


def hide(x: Any, allowed: Any) -> Any:
    """Scores that are `MASKED` where not allowed; x itself where nothing is hidden."""
    return x if allowed is None else jnp.where(allowed, x, MASKED)


def finish(m: Any, l: Any, sink: Any = None) -> tuple[Any, Any]:
    """The end of an online softmax.

    Args:
      m: the greatest score of each query, `MASKED` where it saw no key.
      l: the sum of exp(score - m).
      sink: a logit that takes part in the sum, or None.

    Returns:
      The factor that makes acc the result, and the log-sum-exp; for a query without
      keys 0, and the sink or `MASKED`.
    """
    seen = m > MASKED / 2
    lse = jnp.where(seen, m + jnp.log(jnp.where(seen, l, 1.0)), MASKED)
    if sink is not None:
        greater = jnp.maximum(lse, sink)
        lse = greater + jnp.log(jnp.exp(lse - greater) + jnp.exp(sink - greater))
    return jnp.where(seen, jnp.exp(m - lse), 0.0), lse


def dscores(probs: Any, dprobs: Any, delta: Any, slope: Any) -> Any:
    """Gradient of raw, from the probabilities and their gradients.

    Args:
      delta: sum over a row of probs * dprobs, less the gradient of the log-sum-exp.
    """
    return probs * (dprobs - delta) * slope
