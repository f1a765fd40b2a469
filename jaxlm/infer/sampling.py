"""From logits to a token: small functions that a decoding step composes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Finite: a row in which all is masked must not give NaN.
NEVER = -1e30
# Below this temperature quotients overflow, and the largest logit has all the weight.
GREEDY_BELOW = 1e-30


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """All but the k largest logits of a row are masked; equal ones at the edge stay."""
    smallest_kept = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < smallest_kept, NEVER, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Nucleus filter (Holtzman et al. 2019, arXiv:1904.09751).

    Keeps the most likely tokens up to the first at which their probabilities reach
    `p`; the most likely one always stays.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    edge = jnp.where(before < p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < edge, NEVER, logits)


def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token for each row, and its log-probability.

    Args:
      logits: f32.
      keys: one for each row, so that a row does not depend on its neighbours.
      temperature: 0 (and less than `GREEDY_BELOW`) takes the largest logit.
      top_k: 0 keeps all.
      top_p: 1 keeps all.

    Returns:
      Tokens (int32), and their log-probabilities (f32) under the model as it is:
      before temperature and filters.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    if temperature < GREEDY_BELOW:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        scaled = logits / temperature
        if 0 < top_k < logits.shape[-1]:
            scaled = keep_top_k(scaled, top_k)
        if top_p < 1:
            scaled = keep_top_p(scaled, top_p)
        tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    tokens = tokens.astype(jnp.int32)
    # A comparison instead of an index: it keeps the layout of a sharded batch.
    hit = jnp.arange(logits.shape[-1]) == tokens[:, None]
    return tokens, jnp.sum(jnp.where(hit, logprobs, 0.0), axis=-1)
