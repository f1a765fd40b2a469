"""Known kinds of attention heads, found by where they look.

Each score is a mean over queries of the probability on the keys that such a head would
look at: 1 for a pure head of the kind. Sources: Elhage et al. 2021, "A mathematical
framework for transformer circuits"; Olsson et al. 2022, arXiv:2209.11895.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def previous_token(probs: Float[Array, "*L B N T T"]) -> Float[Array, "*L B N"]:
    """Returns the mean probability on the token before the query."""
    return jnp.mean(jnp.diagonal(probs, offset=-1, axis1=-2, axis2=-1), axis=-1)


def duplicate_token(
    probs: Float[Array, "*L B N T T"], tokens: Int[Array, "B T"]
) -> Float[Array, "*L B N"]:
    """Returns the mean probability on earlier occurrences of the query's token.

    Over the queries that have one; 0 if none has.
    """
    return _mean_mass(probs, _same_before(tokens))


def induction(
    probs: Float[Array, "*L B N T T"], tokens: Int[Array, "B T"]
) -> Float[Array, "*L B N"]:
    """Returns the mean probability on what followed earlier occurrences.

    Over the queries whose token has occurred before; 0 if none has. A text that repeats
    random tokens shows induction alone.
    """
    same = _same_before(tokens)
    after = jnp.pad(same, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    return _mean_mass(probs, after)


def _same_before(tokens: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where an earlier key has the query's token."""
    same = tokens[:, :, None] == tokens[:, None, :]
    return same & jnp.tril(jnp.ones(same.shape[1:], bool), k=-1)


def _mean_mass(
    probs: Float[Array, "*L B N T T"], keys: Bool[Array, "B T T"]
) -> Float[Array, "*L B N"]:
    """Mean over queries with chosen keys of the probability on these keys."""
    mass = jnp.sum(jnp.where(keys[:, None], probs, 0), axis=(-2, -1))
    count = jnp.sum(keys.any(axis=-1), axis=-1)
    return mass / jnp.maximum(count, 1)[:, None]
