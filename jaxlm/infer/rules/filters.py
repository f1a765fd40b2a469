"""Filters: rules that leave only the likelier tokens of a row, and always one.

Each takes logits [B, V] and the setting of each row [B], and returns the logits with
`NEVER` for what it drops. They need no sorting: the cut is found by bisection, which
XLA runs many times faster (`docs/decisions.md`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# The logit of a dropped token. Finite, so that a row without others does not give NaN.
NEVER = -1e30


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Keeps the k largest logits of a row; ties with the k-th are kept."""
    return _keep(logits, most(logits, jnp.ones_like(logits), k))


def keep_top_p(
    logits: Float[Array, "B V"], p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Nucleus filter (Holtzman et al. 2019, arXiv:1904.09751).

    Keeps the fewest most likely tokens whose probabilities sum to at least `p`, with
    all ties of the last.
    """
    return _keep(logits, most(logits, jax.nn.softmax(logits, axis=-1), p))


def keep_min_p(
    logits: Float[Array, "B V"], p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Keeps tokens with at least `p` times the largest probability.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    largest = logits.max(axis=-1, keepdims=True)
    return _keep(logits, logits >= largest + jnp.log(p)[:, None])


def keep_typical(
    logits: Float[Array, "B V"], p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Locally typical filter (Meister et al. 2022, arXiv:2202.00666).

    Keeps the fewest tokens whose probabilities sum to at least `p`, first those whose
    surprisal is nearest to the entropy of the row.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logprobs)
    entropy = -jnp.sum(probs * logprobs, axis=-1, keepdims=True)
    return _keep(logits, most(-jnp.abs(logprobs + entropy), probs, p))


def keep_top_n_sigma(
    logits: Float[Array, "B V"], n: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Keeps logits within `n` standard deviations of the largest (arXiv:2411.07641).

    The deviation is that of the tokens that no earlier rule has dropped.
    """
    alive = logits > NEVER / 2
    mean = jnp.mean(logits, axis=-1, keepdims=True, where=alive)
    variance = jnp.mean((logits - mean) ** 2, axis=-1, keepdims=True, where=alive)
    largest = logits.max(axis=-1, keepdims=True)
    return _keep(logits, logits >= largest - n[:, None] * jnp.sqrt(variance))


def drop_top_choices(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    probability: Float[Array, " B"],
    threshold: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """XTC: excludes top choices (oobabooga/text-generation-webui pull request 6335).

    With this probability, all tokens that have at least the threshold's probability are
    dropped, except the least likely of them.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    # Tokens that are dropped already have no probability.
    top = (probs >= threshold[:, None]) & (probs > 0)
    least = jnp.min(probs, axis=-1, keepdims=True, where=top, initial=jnp.inf)
    happens = jax.vmap(jax.random.uniform)(keys) < probability
    return _keep(logits, ~(top & (probs > least) & happens[:, None]))


def _keep(logits: Float[Array, "B V"], kept: Bool[Array, "B V"]) -> Array:
    return jnp.where(kept, logits, NEVER)


def most(
    scores: Float[Array, "B V"], weights: Float[Array, "B V"], enough: Array
) -> Bool[Array, "B V"]:
    """Masks the fewest tokens of highest score whose weights sum to `enough` [B].

    Ties with the last are masked too, and all tokens if their sum is below `enough`.
    """
    # The bits of a float, as an integer of the same order.
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def refine(i, cut):
        """Sets the next bit of the cut, if enough stays above it."""
        higher = cut | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        above = jnp.where(order >= higher[:, None], weights, 0).sum(axis=-1)
        return jnp.where(above >= enough, higher, cut)

    # One of the arrays, so that the loop keeps the sharding of the batch.
    lowest = jnp.zeros_like(order[:, 0])
    return order >= jax.lax.fori_loop(0, 32, refine, lowest)[:, None]
