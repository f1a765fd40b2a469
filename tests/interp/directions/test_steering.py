"""A planted feature is found by a probe, removed by a projection, restored by steering."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import small

from jaxlm.config import SampleConfig
from jaxlm.infer.generate import generate
from jaxlm.interp.comparison import cosine
from jaxlm.interp.directions.linear_probe import fit_probe
from jaxlm.interp.directions.steering import last_token_values, steering_vector
from jaxlm.model.initialization import init
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap

CONFIG = small(tied_embeddings=False)
PLANTED, TWIN, SAYS = 7, 9, 3
FEATURE = np.random.default_rng(5).normal(size=24).astype(np.float32)
FEATURE /= np.linalg.norm(FEATURE)


@cache
def planted():
    """Token 7 is token 9 with a feature, and the feature makes the model say 3."""
    params = jax.jit(partial(init, CONFIG))(jax.random.key(0))
    table, head = params["embed"]["table"] * 10, params["lm_head"]["kernel"] * 10
    table = table.at[PLANTED].set(table[TWIN] + 3 * FEATURE)
    head = head.at[:, SAYS].add(FEATURE)
    return {**params, "embed": {"table": table}, "lm_head": {"kernel": head}}


def pairs(count):
    """Rows of different lengths that end in the planted token, or in its twin."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(10, 32, rng.integers(3, 9)).tolist() for _ in range(count)]
    return [[*row, PLANTED] for row in rows], [[*row, TWIN] for row in rows]


@pytest.mark.slow
def test_values_are_those_of_each_rows_last_token():
    rows = [[1, 2, 3], [4, 5, 6, 7, 8]]
    values = last_token_values(CONFIG, planted(), rows, 0)
    taps = (Tap("resid_post", (0,)),)
    read = jax.jit(lambda p, x: forward(CONFIG, p, x, taps=taps).trace["resid_post"])
    for row, value in zip(rows, values, strict=True):
        right = read(planted(), np.array([row]))[0, 0, -1]
        np.testing.assert_allclose(value, right, atol=1e-5)


def test_a_probe_is_a_logistic_regression():
    """Its gradient vanishes, and its accuracies are those of its rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)).astype(np.float32) * [1, 5, 0.1, 1, 0] + 3
    y = (x[:, 0] + 0.3 * rng.normal(size=60) > 3).astype(np.int32)
    probe = fit_probe(jnp.asarray(x), jnp.asarray(y), held_out=0.5, ridge=0.1)
    order = np.asarray(jax.random.permutation(jax.random.key(0), 60))
    test, fit = order[:30], order[30:]
    logits = x @ np.asarray(probe.direction) + float(probe.bias)
    right = (logits > 0) == y
    assert probe.accuracy == pytest.approx(right[fit].mean())
    assert probe.held_out_accuracy == pytest.approx(right[test].mean())
    scale = x[fit].std(0)
    z = np.divide(x[fit] - x[fit].mean(0), scale, where=scale > 0, out=0 * x[fit])
    error = 1 / (1 + np.exp(-logits[fit])) - y[fit]
    weights = np.asarray(probe.direction) * scale
    np.testing.assert_allclose(z.T @ error / 30 + 0.1 * weights, 0, atol=1e-4)
    assert abs(error.mean()) < 1e-4
    with pytest.raises(ValueError, match="leaves none to fit to or to test with"):
        fit_probe(jnp.asarray(x), jnp.asarray(y), held_out=0.0)


@pytest.mark.slow
def test_a_planted_feature_is_found_removed_and_restored():
    with_it, without = pairs(60)
    read = partial(last_token_values, CONFIG, planted(), layer=0)
    positive, negative = read(with_it), read(without)
    values = jnp.concatenate([positive, negative])
    probe = fit_probe(values, jnp.arange(120) < 60)
    assert probe.held_out_accuracy >= 0.95
    vector = steering_vector(positive, negative)
    assert cosine(vector, jnp.asarray(FEATURE)) > 0.95
    # Without the feature in any row the same probe is no better than chance.
    shuffled = jax.random.permutation(jax.random.key(3), jnp.arange(60) < 30)
    assert fit_probe(negative, shuffled).held_out_accuracy < 0.8

    tokens = np.array([with_it[0], without[0]])

    @jax.jit
    def says(params, *edits):
        logits = forward(CONFIG, params, tokens, edits=edits).logits[:, -1]
        return logits[:, SAYS] - jnp.mean(logits, axis=-1)

    has, has_not = says(planted())
    removed, _ = says(planted(), Edit("resid_post", "project_out", vector, layer=0))
    _, restored = says(planted(), Edit("resid_post", "add", vector, layer=0))
    assert has > has_not + 1
    assert removed < has_not + 0.3 * (has - has_not)
    assert restored == pytest.approx(float(has), abs=0.2 * float(has - has_not))

    # The same while generating: the probe is read, and steering makes it say 3.
    sample = SampleConfig(temperature=0.0, max_new_tokens=4)
    tap = Tap("resid_post", (0,), reduce="dot", direction=probe.direction)
    steer = Edit("resid_post", "add", 4 * vector, layer=0)
    plain = generate(CONFIG, planted(), [without[0]], sample, taps=(tap,))
    steered = generate(
        CONFIG, planted(), [without[0]], sample, taps=(tap,), edits=(steer,)
    )
    new = slice(len(without[0]), None)
    before, after = (run.traces[0]["resid_post"][0, new] for run in (plain, steered))
    assert (steered.tokens == SAYS).all() and not (plain.tokens == SAYS).all()
    assert (after + probe.bias > 0).all() and before.max() < after.min()
