"""What a model predicts: the distribution of the next token, at any position."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def entropy(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Returns `-sum_v p_v log p_v` of the softmax, in nats, f32."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    # An id that is masked has p log p = 0, where 0 * -inf would be NaN.
    return -jnp.sum(jnp.where(logprobs > -jnp.inf, jnp.exp(logprobs) * logprobs, 0), -1)


def surprise(
    logits: Float[Array, "*B T V"], tokens: Int[Array, "*B T"]
) -> Float[Array, "*B T-1"]:
    """Returns `-log p` of each token that follows, in nats, f32; the first has none."""
    logprobs = jax.nn.log_softmax(logits[..., :-1, :].astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logprobs, tokens[..., 1:, None], axis=-1)[..., 0]


def rank(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """Returns how many ids have a greater logit than the token: 0 for the best."""
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return jnp.sum(logits > own, axis=-1)


def most_likely(
    logits: Float[Array, "*B V"], count: int
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"]]:
    """Returns the `count` most likely ids, and their probabilities, f32."""
    best, ids = jax.lax.top_k(logits.astype(jnp.float32), count)
    total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
    return ids, jnp.exp(best - total)
