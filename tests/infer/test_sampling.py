"""Compares sampling from logits with sets and probabilities computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.infer.sampling import NEVER, keep_top_k, keep_top_p, sample_tokens

ROWS = 20_000


def draws(probs, *, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """Samples from one distribution. Not jitted: operations of one shape compile once."""
    logits = np.broadcast_to(np.log(probs).astype(np.float32), (ROWS, len(probs)))
    keys = jax.random.split(jax.random.key(seed), ROWS)
    tokens, logprobs = sample_tokens(
        jnp.asarray(logits), keys, temperature=temperature, top_k=top_k, top_p=top_p
    )
    return np.asarray(tokens), np.asarray(logprobs)


def kept(masked):
    return [set(np.flatnonzero(row > NEVER / 2).tolist()) for row in np.asarray(masked)]


def logits_of(*rows):
    return jnp.asarray(rows, jnp.float32)


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-30, 1e-40])
def test_temperature_0_and_next_to_0_take_the_largest(temperature):
    logits = logits_of([1.0, 3.0, 2.0, 2.999], [-5.0, -4.0, -6.0, -4.5], [9, 8, 7, 8.5])
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, _ = sample_tokens(logits, keys, temperature=temperature, top_k=0, top_p=1.0)
    assert tokens.tolist() == [1, 1, 0]


def test_of_equal_largest_logits_greedy_takes_the_first():
    logits = logits_of([1, 2, 2, 2])
    key = jax.random.split(jax.random.key(0), 1)
    assert sample_tokens(logits, key, temperature=0.0, top_k=0, top_p=1.0)[
        0
    ].tolist() == [1]


@pytest.mark.parametrize(
    "k, sets",
    [
        (1, [{0}, {1, 2}]),
        (2, [{0, 1, 2}, {1, 2}]),  # at the edge equal ones stay together
        (3, [{0, 1, 2}, {0, 1, 2}]),
        (4, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    ],
)
def test_top_k_keeps_exactly_these(k, sets):
    assert kept(keep_top_k(logits_of([3, 2, 2, 1], [1, 5, 5, 0]), k)) == sets


@pytest.mark.parametrize(
    "p, sets",
    [
        (1e-9, [{2}, {0, 1}]),
        (0.39, [{2}, {0, 1}]),
        (0.41, [{2, 0}, {0, 1}]),
        (0.69, [{2, 0}, {0, 1}]),
        (0.71, [{2, 0, 3}, {0, 1, 2}]),
        (0.89, [{2, 0, 3}, {0, 1, 2}]),
        (0.91, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
        (0.9999, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    ],
)
def test_top_p_keeps_exactly_these(p, sets):
    probs = np.array([[0.3, 0.1, 0.4, 0.2], [0.35, 0.35, 0.2, 0.1]], np.float32)
    assert kept(keep_top_p(jnp.log(probs), p)) == sets


def test_filters_never_leave_nothing():
    flat = jnp.zeros((1, 5))
    assert kept(keep_top_p(flat, 1e-9)) == [{0, 1, 2, 3, 4}]
    assert kept(keep_top_k(flat, 1)) == [{0, 1, 2, 3, 4}]
    masked = jnp.full((1, 5), NEVER)
    assert np.isfinite(np.asarray(keep_top_p(masked, 0.5))).all()


@pytest.mark.parametrize(
    "choice, drawn",
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0, 1}),
        ({"top_p": 0.3}, {0}),
        # After top_k, 0.4 and 0.3 are 0.57 and 0.43.
        ({"top_k": 2, "top_p": 0.5}, {0}),
        ({"top_k": 2, "top_p": 0.6}, {0, 1}),
        # At temperature 0.25 the first has 0.73 of it.
        ({"temperature": 0.25, "top_p": 0.5}, {0}),
        # At temperature 100 all are nearly equal.
        ({"temperature": 100.0, "top_p": 0.6}, {0, 1, 2}),
    ],
)
def test_only_what_the_filters_keep_is_drawn(choice, drawn):
    # Four more, never sampled, so that arrays have the shape of the tests below.
    tokens, _ = draws([0.4, 0.3, 0.2, 0.1, *[1e-300] * 4], **choice)
    assert set(tokens.tolist()) == drawn


PROBS = np.array([0.3, 0.25, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01])


def chi_square(tokens, probs):
    probs = probs / probs.sum()
    expected = len(tokens) * probs[probs > 0]
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "choice, probs",
    [
        ({}, PROBS),
        ({"temperature": 0.5}, PROBS**2),
        ({"temperature": 2.0}, PROBS**0.5),
        ({"top_k": 3}, PROBS * (np.arange(8) < 3)),
        ({"top_p": 0.8}, PROBS * (np.arange(8) < 4)),
        ({"temperature": 2.0, "top_k": 5}, PROBS**0.5 * (np.arange(8) < 5)),
    ],
)
def test_frequencies_are_the_probabilities(choice, probs):
    """A correct sampler fails this for one seed in a million; the seed is fixed."""
    limit = stats.chi2.ppf(1 - 1e-6, np.count_nonzero(probs) - 1)
    tokens, _ = draws(PROBS, **choice)
    assert chi_square(tokens, probs) < limit
    # Compared with a temperature 25 % off, the same samples far exceed the limit.
    assert chi_square(tokens, probs**1.25) > limit


def test_rows_and_seeds_differ_and_repeat():
    first, again, other = (draws(PROBS, seed=s)[0] for s in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    assert len(set(first.tolist())) > 2


def test_logprobs_are_the_models_before_temperature_and_filters():
    for choice in ({}, {"temperature": 0.0}, {"temperature": 0.3, "top_k": 2}):
        tokens, logprobs = draws(PROBS, **choice)
        np.testing.assert_allclose(logprobs, np.log(PROBS)[tokens], rtol=1e-5)


def test_nan_logits_give_nan_logprobs():
    """`generate` detects them by this: argmax alone would return a token."""
    logits = logits_of([1.0, np.nan, 2.0], [1.0, 2.0, 3.0])
    keys = jax.random.split(jax.random.key(0), 2)
    for temperature in (0.0, 1.0):
        _, logprobs = sample_tokens(
            logits, keys, temperature=temperature, top_k=0, top_p=1.0
        )
        assert np.isnan(logprobs[0]) and np.isfinite(logprobs[1])
