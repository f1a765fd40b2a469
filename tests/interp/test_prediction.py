"""Entropy, ranks and the best tokens, from the definitions."""

import jax.numpy as jnp
import numpy as np

from jaxlm.interp.prediction import entropy, most_likely, rank, surprise

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 11)) * 3


def probabilities():
    p = np.exp(LOGITS)
    return p / p.sum(-1, keepdims=True)


def test_entropy():
    p = probabilities()
    wanted = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(entropy(jnp.asarray(LOGITS)), wanted, rtol=1e-5)
    masked = jnp.array([0.0, -jnp.inf, 0.0])
    np.testing.assert_allclose(entropy(masked), np.log(2), rtol=1e-6)


def test_rank():
    tokens = np.array([[0, 5, 10], [3, 3, 3]])
    order = np.argsort(-LOGITS, axis=-1)
    wanted = (order == tokens[..., None]).argmax(-1)
    np.testing.assert_array_equal(
        rank(jnp.asarray(LOGITS), jnp.asarray(tokens)), wanted
    )


def test_most_likely():
    ids, p = most_likely(jnp.asarray(LOGITS), 4)
    wanted = np.argsort(-LOGITS, axis=-1)[..., :4]
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(
        p, np.take_along_axis(probabilities(), wanted, -1), rtol=1e-5
    )


def test_surprise():
    tokens = np.array([[0, 5, 10], [3, 3, 3]])
    p = probabilities()
    wanted = [[-np.log(p[b, t, tokens[b, t + 1]]) for t in range(2)] for b in range(2)]
    ours = surprise(jnp.asarray(LOGITS), jnp.asarray(tokens))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
