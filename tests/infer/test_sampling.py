"""Compares sampling from logits with sets and probabilities computed by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.config import SampleConfig
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.rules import penalties
from jaxlm.infer.rules.automata import FREE, Automata, StateTable
from jaxlm.infer.rules.filters import (
    NEVER,
    keep_min_p,
    keep_top_k,
    keep_top_n_sigma,
    keep_top_p,
    keep_typical,
)
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.sampling import filtered, penalized, sample_tokens

ROWS = 100_000
V = 8
# Bytes of eight tokens, for the breakers of DRY.
TOKEN_BYTES = [b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"\n"]
penalized_jitted, filtered_jitted = jax.jit(penalized), jax.jit(filtered)


def history_of(rows, new=0, length=16):
    """Rows of tokens, of which the last `new` are not of the prompt."""
    tokens = np.full((len(rows), length), V - 1, np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    lengths = np.array([len(row) for row in rows], np.int32)
    return History(*map(jnp.asarray, (tokens, lengths, lengths - new)))


@jax.jit
def sample_jitted(logits, keys, settings, history):
    """Samples without automata, one token a row."""
    B, V = logits.shape
    none = Automata(V)
    table = StateTable(jnp.asarray(none.table), jnp.asarray(none.needs))
    states = jnp.full(B, FREE, jnp.int32)
    return sample_tokens(logits, keys, settings, history, table, states)


def test_a_plain_text_meets_three_conditions():
    """Of penalties, of a grammar, and whether it is greedy: the rest is inside them."""
    logits, keys = jnp.zeros((1, V)), jax.random.split(jax.random.key(0), 1)
    settings = jax.tree.map(jnp.asarray, row_settings([SampleConfig()], V, TOKEN_BYTES))
    call = jax.make_jaxpr(sample_jitted)(logits, keys, settings, history_of([[0]]))
    (inner,) = call.eqns
    conditions = [e for e in inner.params["jaxpr"].eqns if e.primitive.name == "cond"]
    assert len(conditions) == 3


def draws(probs, *, seed=0, text=(), new=0, **fields):
    """Samples many times from one distribution; all rules are in one program."""
    logits = np.broadcast_to(np.log(probs).astype(np.float32), (ROWS, V))
    keys = jax.random.split(jax.random.key(seed), ROWS)
    settings = row_settings([SampleConfig(**fields)], V, TOKEN_BYTES)
    settings = jax.tree.map(
        lambda x: np.broadcast_to(x, (ROWS, *x.shape[1:])), settings
    )
    history = history_of([text], new)
    history = jax.tree.map(lambda x: np.broadcast_to(x, (ROWS, *x.shape[1:])), history)
    return np.asarray(sample_jitted(logits, keys, settings, history))


def kept(masked):
    return [set(np.flatnonzero(row > NEVER / 2).tolist()) for row in np.asarray(masked)]


def logits_of(*rows):
    return jnp.asarray(rows, jnp.float32)


def sample_few(logits, history=None, **fields):
    """Samples one token for each row of logits."""
    logits = jnp.asarray(logits, jnp.float32)
    settings = row_settings([SampleConfig(**fields)] * len(logits), logits.shape[1])
    keys = jax.random.split(jax.random.key(0), len(logits))
    history = history or history_of([[]] * len(logits))
    return sample_jitted(logits, keys, settings, history).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-19, 1e-30, 1e-40])
def test_temperature_0_and_next_to_0_take_the_largest(temperature):
    logits = [[1.0, 3.0, 2.0, 2.999], [-5.0, -4.0, -6.0, -4.5], [9, 8, 7, 8.5]]
    assert sample_few(logits, temperature=temperature) == [1, 1, 0]


def test_of_equal_largest_logits_greedy_takes_the_first():
    assert sample_few([[1, 2, 2, 2]] * 3, temperature=0.0) == [1, 1, 1]


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
    assert (
        kept(keep_top_k(logits_of([3, 2, 2, 1], [1, 5, 5, 0]), jnp.array([k, k])))
        == sets
    )


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
    assert kept(keep_top_p(jnp.log(probs), jnp.array([p, p]))) == sets


def test_filters_never_leave_nothing():
    flat, one = jnp.zeros((1, 5)), jnp.ones(1)
    assert kept(keep_top_p(flat, 1e-9 * one)) == [{0, 1, 2, 3, 4}]
    assert kept(keep_top_k(flat, one.astype(int))) == [{0, 1, 2, 3, 4}]
    for keep in (keep_top_p, keep_min_p, keep_typical, keep_top_n_sigma):
        strictest = one if keep is keep_min_p else 1e-6 * one
        assert len(kept(keep(logits_of([3, 1, 2, 0.5, 0]), strictest))[0]) == 1
        masked = jnp.full((1, 5), NEVER)
        assert np.isfinite(np.asarray(keep(masked, one / 2))).all()


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
    tokens = draws([0.4, 0.3, 0.2, 0.1, *[1e-300] * 4], **choice)
    assert set(tokens.tolist()) == drawn


PROBS = np.array([0.3, 0.25, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01])
INDEX = np.arange(V)
# The last tokens are those of index 4 and 5; before came 4, 5, 0.
TEXT = (4, 5, 0, 1, 2, 2, 4, 5)


def chi_square(tokens, probs):
    probs = probs / probs.sum()
    expected = len(tokens) * probs[probs > 0]
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum())


def without_top_choices(probs, probability, first, last):
    """The mixture of XTC, which drops the tokens from `first` to before `last`."""
    dropped = probs * ((first > INDEX) | (last <= INDEX))
    return (
        probability * dropped / dropped.sum() + (1 - probability) * probs / probs.sum()
    )


def less(probs, **logits):
    """Adds to logits, by `i3=-1` for token 3."""
    return probs * np.exp([logits.get(f"i{i}", 0.0) for i in INDEX])


LOGITS = np.log(PROBS)
ENTROPY = -np.sum(PROBS * LOGITS)
NEAREST = np.argsort(np.abs(-LOGITS - ENTROPY))
TEXT_IS = {"text": TEXT, "new": 4}
HALVES = np.where(np.isin(INDEX, TEXT), LOGITS * 2, LOGITS)


@pytest.mark.parametrize(
    "choice, probs",
    [
        ({}, PROBS),
        ({"temperature": 0.5}, PROBS**2),
        ({"temperature": 2.0}, PROBS**0.5),
        ({"top_k": 3}, PROBS * (INDEX < 3)),
        ({"top_p": 0.8}, PROBS * (INDEX < 4)),
        ({"min_p": 0.25}, PROBS * (INDEX < 5)),
        ({"typical_p": 0.5}, PROBS * np.isin(INDEX, NEAREST[:3])),
        ({"top_n_sigma": 1.2}, PROBS * (LOGITS.max() - 1.2 * LOGITS.std() <= LOGITS)),
        (
            {"xtc_probability": 0.3, "xtc_threshold": 0.15},
            without_top_choices(PROBS, 0.3, 0, 2),
        ),
        ({"bias_ids": (1, 7), "biases": (-1.0, 2.0)}, less(PROBS, i1=-1.0, i7=2.0)),
        ({"forbidden_ids": (0, 4)}, PROBS * ~np.isin(INDEX, (0, 4))),
        ({"repetition_penalty": 2.0, **TEXT_IS}, np.exp(HALVES)),
        (
            {"presence_penalty": 0.5, "frequency_penalty": 0.7, **TEXT_IS},
            less(PROBS, i2=-1.9, i4=-1.2, i5=-1.2),
        ),
        ({"no_repeat_ngram": 3, **TEXT_IS}, PROBS * (INDEX != 0)),
        ({"dry_multiplier": 0.4, **TEXT_IS}, less(PROBS, i0=-0.4)),
        (
            {"dry_multiplier": 0.4, "dry_allowed_length": 1, **TEXT_IS},
            less(PROBS, i0=-0.4 * 1.75),
        ),
        (
            {"min_new_tokens": 5, "stop_ids": (1, 3), **TEXT_IS},
            PROBS * ~np.isin(INDEX, (1, 3)),
        ),
        ({"min_new_tokens": 4, "stop_ids": (1, 3), **TEXT_IS}, PROBS),
        # Composed ones.
        ({"temperature": 2.0, "top_k": 5}, PROBS**0.5 * (INDEX < 5)),
        # After top_k, the shares are 0.4, 0.33 and 0.27.
        ({"top_k": 3, "top_p": 0.7}, PROBS * (INDEX < 2)),
        ({"top_p": 0.9, "min_p": 0.3}, PROBS * (INDEX < 4)),
        (
            {"bias_ids": (7,), "biases": (4.0,), "temperature": 2.0, "top_k": 2},
            less(PROBS, i7=4.0) ** 0.5 * np.isin(INDEX, (0, 7)),
        ),
        (
            {
                **{"frequency_penalty": 0.3, "forbidden_ids": (0,)},
                **{"temperature": 0.8, "top_p": 0.9},
                **{"xtc_probability": 0.5, "xtc_threshold": 0.15},
                **TEXT_IS,
            },
            # 1, 2, 3 and 4 have the shares 0.54, 0.19, 0.17 and 0.09.
            without_top_choices(
                less(PROBS, i2=-0.6, i4=-0.3, i5=-0.3) ** 1.25
                * np.isin(INDEX, (1, 2, 3, 4)),
                *(0.5, 1, 3),
            ),
        ),
        (
            {
                **{"dry_multiplier": 0.4, "dry_allowed_length": 1},
                **{"no_repeat_ngram": 3, "temperature": 1.5, "typical_p": 0.6},
                # 0 came after 4 and 5, 3 after a 5 alone.
                **{"text": (1, 5, 3, 4, 5, 0, 4, 5), "new": 4},
            },
            # The entropy is 1.74; 4, 3, 2 and 1 are nearest.
            less(PROBS, i3=-0.4) ** (2 / 3) * np.isin(INDEX, (1, 2, 3, 4)),
        ),
        (
            {"temperature": 1.25, "top_n_sigma": 1.6, "top_k": 5, "typical_p": 0.55},
            # Five are within 1.6 deviations; 2, 1 and 0 are nearest to their entropy.
            PROBS**0.8 * (INDEX < 3),
        ),
        (
            {
                **{"repetition_penalty": 1.2, "presence_penalty": 0.5},
                **{"dry_multiplier": 0.4, "forbidden_ids": (1,), "temperature": 1.5},
                **{"top_n_sigma": 2.0, "top_p": 0.87},
                **{"xtc_probability": 0.5, "xtc_threshold": 0.29},
                **TEXT_IS,
            },
            # 0, 2, 3 and 4 are within two deviations, with the shares 0.37, 0.25, 0.27
            # and 0.12; after top_p, 0 and 3 have 0.41 and 0.31.
            without_top_choices(
                less(
                    np.exp(np.where(np.isin(INDEX, TEXT), LOGITS * 1.2, LOGITS)),
                    **{"i0": -0.4, "i2": -0.5, "i4": -0.5},
                )
                ** (2 / 3)
                * np.isin(INDEX, (0, 2, 3)),
                *(0.5, 0, 1),
            ),
        ),
    ],
)
def test_frequencies_are_the_probabilities(choice, probs):
    """A correct sampler fails this for one seed in a million; the seed is fixed."""
    left = np.count_nonzero(probs)
    limit = stats.chi2.ppf(1 - 1e-6, left - 1)
    tokens = draws(PROBS, **choice)
    assert chi_square(tokens, probs) < limit
    # Compared with a temperature 25 % off, the same samples far exceed the limit.
    assert chi_square(tokens, probs**1.25) > limit


def test_rows_and_seeds_differ_and_repeat():
    first, again, other = (draws(PROBS, seed=s) for s in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    assert len(set(first.tolist())) > 2


def test_each_row_has_its_own_settings():
    """Every rule at once, each in a row of its own, beside rows that use none."""
    rules = [
        *({}, {"temperature": 0.0}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.4}),
        *({"min_p": 0.5}, {"typical_p": 0.3}, {"top_n_sigma": 0.5}),
        {"xtc_probability": 0.9, "xtc_threshold": 0.05},
        *({"repetition_penalty": 3.0}, {"presence_penalty": 2.0}),
        *({"frequency_penalty": -2.0}, {"no_repeat_ngram": 2}),
        *({"dry_multiplier": 5.0}, {"forbidden_ids": (0, 1)}),
        *(
            {"bias_ids": (6,), "biases": (3.0,)},
            {"min_new_tokens": 9, "stop_ids": (0,)},
        ),
    ]
    samples = [SampleConfig(**fields) for fields in rules]
    B = len(samples)
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (B, V)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), B)
    history = history_of([TEXT] * B, new=4)
    settings = row_settings(samples, V, TOKEN_BYTES)
    penalties_of = penalized_jitted(logits, settings, history)
    together = filtered_jitted(penalties_of, keys, settings)
    for i, sample in enumerate(samples):
        settings = row_settings([sample], V, TOKEN_BYTES)
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], history)
        alone = penalized_jitted(logits[i : i + 1], settings, row)
        alone = filtered_jitted(alone, keys[i : i + 1], settings)
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-6)
        changed = not np.allclose(alone[0], logits[i])
        assert changed == (rules[i] not in ({}, {"temperature": 0.0}))


def longest_matches(text):
    """For each index the longest run before it that also ends the text, by trial."""
    found = []
    for i in range(len(text)):
        lengths = range(i + 1)
        found.append(
            max(n for n in lengths if text[i - n : i] == text[len(text) - n :])
        )
    return found


def test_suffix_matches_are_those_found_by_trial():
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 2, n).tolist() for n in (1, 2, 5, 11, 16)]
    texts += [[0] * 9, [0, 1] * 6, []]
    history = history_of(texts)
    for limit in (0, 1, 3, 16):
        limits = jnp.full(len(texts), limit)
        found = penalties.suffix_matches(history, limits)
        for row, text in zip(found.tolist(), texts, strict=True):
            wanted = [min(n, limit) for n in longest_matches(text)]
            assert row == wanted + [0] * (16 - len(text))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_no_ngram_is_repeated(n):
    """Greedy decoding of random logits, against a set of all n-grams so far."""
    rng = np.random.default_rng(n)
    text, length = [0], 16
    for _ in range(length - 1):
        logits = rng.normal(0, 1, (1, V))
        history = history_of([text])
        token = sample_few(logits, history, temperature=0.0, no_repeat_ngram=n)[0]
        seen = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        free = [t for t in range(V) if tuple([*text, t][-n:]) not in seen]
        free = free if n <= len(text) + 1 else list(range(V))
        if not free:
            break
        assert token == max(free, key=lambda t: logits[0, t])
        text.append(token)


def test_dry_stops_at_breakers():
    """Token 7 is a line break: no repetition extends across it."""
    flat = jnp.zeros((1, V))
    settings = row_settings([SampleConfig(dry_multiplier=1.0)], V, TOKEN_BYTES)

    def penalty(*text):
        return (-penalized_jitted(flat, settings, history_of([text]))[0]).tolist()

    # After 0 1 2 came 3 before: a repetition of three tokens.
    assert penalty(0, 1, 2, 3, 0, 1, 2)[3] == pytest.approx(1.75)
    # Of two after the break, and of one.
    assert penalty(7, 1, 2, 3, 7, 1, 2)[3] == pytest.approx(1.0)
    assert penalty(0, 7, 2, 3, 0, 7, 2)[3] == 0
    # The break itself may always follow, and nothing follows it as a repetition.
    assert penalty(0, 1, 2, 7, 0, 1, 2) == [0] * V
    assert penalty(0, 1, 7, 3, 0, 1, 7) == [0] * V


def test_a_long_repetition_has_a_finite_penalty():
    settings = row_settings([SampleConfig(dry_multiplier=1.0, dry_base=1e6)], V)
    logits = penalized_jitted(jnp.zeros((1, V)), settings, history_of([[1] * 15]))
    assert np.isfinite(np.asarray(logits)).all()
    assert (np.asarray(logits) < -1e20).sum() == 1


def test_forbidden_ids_stay_forbidden():
    """Whatever the other rules make of their logits."""
    for temperature, penalty in itertools.product((1e-9, 1.0, 100.0), (0.01, 1.0, 9.0)):
        tokens = draws(
            np.full(V, 1 / V),
            temperature=temperature,
            repetition_penalty=penalty,
            forbidden_ids=(1, 2, 3),
            bias_ids=(1,),
            biases=(80.0,),
            top_p=0.99,
            typical_p=0.99,
            top_n_sigma=3.0,
            **TEXT_IS,
        )
        assert not np.isin(tokens, (1, 2, 3)).any()
