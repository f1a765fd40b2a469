"""Scores of heads: pure heads score 1, and every score equals its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.interp.head_scores import duplicate_token, induction, previous_token

RNG = np.random.default_rng(0)
HALF = RNG.permutation(9)[None]
TOKENS = jnp.asarray(np.concatenate([HALF, HALF], axis=1))
T = TOKENS.shape[1]


def pure(offset):
    """A head that looks `offset` tokens back, and at the first token before that."""
    probs = np.zeros((1, 1, T, T), np.float32)
    for t in range(T):
        probs[0, 0, t, max(t - offset, 0)] = 1
    return jnp.asarray(probs)


@pytest.mark.parametrize(
    "score, offset", [("previous", 1), ("duplicate", 9), ("induction", 8)]
)
def test_a_pure_head_scores_1_for_its_kind_only(score, offset):
    scores = {
        "previous": previous_token(pure(offset)),
        "duplicate": duplicate_token(pure(offset), TOKENS),
        "induction": induction(pure(offset), TOKENS),
    }
    assert float(scores.pop(score)[0, 0]) == pytest.approx(1)
    for other in scores.values():
        assert float(other[0, 0]) < 0.2


def test_the_definitions():
    tokens = RNG.integers(0, 4, (2, 12))
    probs = RNG.dirichlet(np.ones(12), size=(3, 2, 2, 12)).astype(np.float32)
    wanted = np.zeros((2, 3, 2, 2))
    for at in np.ndindex(3, 2, 2):
        layer, row, head = at
        for kind, shift in enumerate((0, 1)):
            masses = []
            for t in range(12):
                before = [s for s in range(t) if tokens[row, s] == tokens[row, t]]
                if before:
                    keys = [s + shift for s in before]
                    masses.append(probs[layer, row, head, t, keys].sum())
            wanted[(kind, *at)] = np.mean(masses)
    probs, tokens = jnp.asarray(probs), jnp.asarray(tokens)
    np.testing.assert_allclose(duplicate_token(probs, tokens), wanted[0], rtol=1e-4)
    np.testing.assert_allclose(induction(probs, tokens), wanted[1], rtol=1e-4)
    assert not induction(probs[..., :1, :1], tokens[:, :1]).any()
