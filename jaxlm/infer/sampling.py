"""From logits to a token: the functions that a decoding step composes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# The logit of a masked token. Finite, so that a fully masked row does not give NaN.
NEVER = -1e30
# Below this temperature logits / temperature could fall below `NEVER`, and the largest
# logit has all the probability anyway.
GREEDY_BELOW = 1e-20


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Masks all but the k largest logits of a row; ties with the k-th are kept."""
    smallest_kept = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < smallest_kept, NEVER, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Nucleus filter (Holtzman et al. 2019, arXiv:1904.09751).

    Keeps the fewest most likely tokens whose probabilities sum to at least `p`, and
    always the most likely one.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.where(mass_before < p, descending, jnp.inf)
    smallest_kept = kept.min(axis=-1, keepdims=True)
    return jnp.where(logits < smallest_kept, NEVER, logits)


def sample_tokens(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Samples a token for each row.

    Args:
      logits: f32.
      keys: one for each row, so that a row does not depend on its neighbours.
      temperature: below `GREEDY_BELOW`, 0 included, takes the largest logit.
      top_k: 0 keeps all.
      top_p: 1 keeps all.

    Returns:
      Tokens (int32), and their log-probabilities (f32) under the given logits, before
      temperature and filters.
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
    # A comparison instead of a gather: it keeps the sharding of the batch.
    is_token = jnp.arange(logits.shape[-1]) == tokens[:, None]
    return tokens, jnp.sum(jnp.where(is_token, logprobs, 0.0), axis=-1)
