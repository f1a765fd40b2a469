"""Sweeps equal single calls, and known results of patching."""

from functools import lru_cache, partial

import jax
import numpy as np
import pytest
from model_case import ids, make, small

from jaxlm.interp.causes.patching import (
    activation_patching,
    attribution_patching,
    head_ablation,
    head_patching,
    metric_of,
    recheck,
)
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap

CONFIG, PARAMS = make(small(num_layers=3))
T = 6
CORRUPT = ids(1, T)
CLEAN = CORRUPT.at[0, 2].add(7) % 32


def metric(logits):
    return logits[0, 3] - logits[0, 4]


bound = partial(partial, config=CONFIG, metric=metric)


@lru_cache
def streams(site="resid_pre"):
    """(clean, corrupt) traces."""
    run = jax.jit(lambda p, x: forward(CONFIG, p, x, taps=(Tap(site),)).trace[site])
    return run(PARAMS, CLEAN), run(PARAMS, CORRUPT)


@lru_cache
def sweep_of(site="resid_pre"):
    return jax.jit(bound(activation_patching, site=site, batch_size=4))


def value(params, tokens):
    return float(jax.jit(bound(metric_of))(params=params, tokens=tokens))


@pytest.mark.slow
def test_patching_moves_the_difference_of_two_texts():
    source, _ = streams()
    grid = sweep_of()(params=PARAMS, tokens=CORRUPT, source=source)
    clean, corrupt = value(PARAMS, CLEAN), value(PARAMS, CORRUPT)
    assert grid.shape == (3, T) and abs(clean - corrupt) > 0.1
    # The texts differ in token 2 only: before it nothing is moved, at layer 0 all of
    # it at that token, and in the end all at the last one (after the last layer).
    np.testing.assert_allclose(grid[:, :2], corrupt, atol=2e-5)
    np.testing.assert_allclose(grid[0, 2], clean, atol=2e-5)
    np.testing.assert_allclose(grid[0, 3:], corrupt, atol=2e-5)
    source = streams("resid_post")[0]
    after = sweep_of("resid_post")(params=PARAMS, tokens=CORRUPT, source=source)
    np.testing.assert_allclose(after[-1, -1], clean, atol=2e-5)
    np.testing.assert_allclose(after[-1, :-1], corrupt, atol=2e-5)
    np.testing.assert_allclose(after[:-1], grid[1:], atol=2e-5)


@pytest.mark.slow
def test_an_ablated_head_is_one_without_weights():
    grid = jax.jit(bound(head_ablation, batch_size=5))(params=PARAMS, tokens=CLEAN)
    assert grid.shape == (3, 6)
    attn = PARAMS["layers"]["attn"]
    for layer, head in ((0, 0), (2, 5)):
        without = {**attn, "o": attn["o"].at[layer, head].set(0.0)}
        params = {**PARAMS, "layers": {**PARAMS["layers"], "attn": without}}
        np.testing.assert_allclose(grid[layer, head], value(params, CLEAN), atol=2e-5)
    # A head of the other text, by a single edited pass.
    source = streams("z")[0]
    patched = jax.jit(bound(head_patching))(
        params=PARAMS, tokens=CORRUPT, source=source
    )
    edit = Edit("z", "set", source, layer=1, head=3)
    single = jax.jit(bound(metric_of))(params=PARAMS, tokens=CORRUPT, edits=(edit,))
    np.testing.assert_allclose(patched[1, 3], single, atol=2e-5)


@pytest.mark.slow
def test_attribution_patching_is_the_slope_of_patching():
    clean, corrupt = streams()
    step = 0.01
    source = corrupt + step * (clean - corrupt)
    estimate = jax.jit(bound(attribution_patching))
    ours = estimate(params=PARAMS, tokens=CORRUPT, source=source)
    exact = sweep_of()(params=PARAMS, tokens=CORRUPT, source=source)
    exact = np.asarray(exact) - value(PARAMS, CORRUPT)
    assert np.corrcoef(np.ravel(ours), np.ravel(exact))[0, 1] >= 0.999
    np.testing.assert_allclose(ours, exact, atol=0.05 * np.abs(exact).max())
    cells, changes = jax.jit(bound(recheck, count=3))(
        params=PARAMS, tokens=CORRUPT, source=source, estimate=ours
    )
    order = np.argsort(-np.abs(np.ravel(ours)))[:3]
    np.testing.assert_array_equal(np.ravel_multi_index(cells.T, ours.shape), order)
    np.testing.assert_allclose(changes, exact.ravel()[order], atol=2e-5)
