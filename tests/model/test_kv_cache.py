"""Decoding with a cache: rows of other lengths, windows, stacked and unstacked."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import ids, make, small

from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import append
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.probe import Tap
from jaxlm.tree import unstack

T = 16
CONFIG = small(num_layers=3, layer_pattern=("local", "global"), window=5)


@pytest.fixture(scope="module")
def model():
    return make(CONFIG)


STACKED = [True, pytest.param(False, marks=pytest.mark.slow)]


@pytest.mark.parametrize("stacked", STACKED, ids=["stacked", "layer by layer"])
def test_a_row_equals_the_same_prompt_alone(model, stacked):
    """Prompts of 4 and 9 tokens, padded to 10, then 6 tokens more, beyond the window.

    Each equals the full forward of that text by itself.
    """
    config, params = model
    lengths = jnp.array([4, 9], jnp.int32)
    texts = ids(2, T)
    prompts = jnp.where(jnp.arange(10) < lengths[:, None], texts[:, :10], 0)
    if not stacked:
        params = {**params, "layers": unstack(params["layers"], config.num_layers)}

    @jax.jit
    def decode(params):
        cache = init_cache(config, 2, 24, jnp.float32)
        if not stacked:
            layers = unstack(cache.layers, config.num_layers)
            cache = dataclasses.replace(cache, layers=layers)
        out = forward(config, params, prompts, cache=cache)
        cache = dataclasses.replace(out.cache, lengths=lengths)

        def one(cache, step):
            token = jnp.take_along_axis(texts, (lengths + step)[:, None], axis=1)
            out = forward(config, params, token, cache=cache)
            return out.cache, out.logits[:, 0]

        cache, logits = jax.lax.scan(one, cache, jnp.arange(6))
        return out.logits, logits.swapaxes(0, 1), cache.lengths

    prefill, decoded, new_lengths = decode(params)
    np.testing.assert_array_equal(new_lengths, lengths + 6)
    full = jax.jit(lambda p: forward(config, p, texts).logits)(params)
    for row, n in enumerate(lengths.tolist()):
        np.testing.assert_allclose(prefill[row, :n], full[row, :n], atol=1e-4)
        np.testing.assert_allclose(decoded[row], full[row, n : n + 6], atol=1e-4)


@pytest.mark.slow
def test_a_cache_in_bfloat16_is_close(model):
    config, params = model

    @jax.jit
    def run(params, dtype_cache):
        out = forward(config, params, ids(2, 8), cache=dtype_cache)
        return out.logits, out.cache.layers.keys

    exact, _ = run(params, init_cache(config, 2, 8, jnp.float32))
    rounded, keys = run(params, init_cache(config, 2, 8, jnp.bfloat16))
    assert keys.dtype == jnp.bfloat16
    assert 0 < np.abs(exact - rounded).max() < 0.1 * exact.std()
    as_computed = init_cache(dataclasses.replace(config, dtype="bfloat16"), 2, 8)
    assert as_computed.layers.keys.dtype == jnp.bfloat16


def test_append_writes_each_row_at_its_length():
    cache = init_cache(CONFIG, 2, 8, jnp.float32)
    layer = unstack(cache.layers, CONFIG.num_layers)[0]
    new = jnp.ones((2, 2, 3, 8))
    after = append(layer, jnp.array([1, 5]), new, 2 * new)
    written = np.zeros((2, 8))
    written[0, 1:3] = written[1, 5:7] = 1
    np.testing.assert_array_equal(after.keys[..., 0, 0], written)
    np.testing.assert_array_equal(after.values[..., 2, 7], 2 * written)
    # The cache that was given is as it was.
    assert not layer.keys.any()


def test_unstack_keeps_the_order():
    tree = {"a": jnp.arange(6).reshape(3, 2)}
    layers = unstack(tree, 3)
    assert [layer["a"].tolist() for layer in layers] == [[0, 1], [2, 3], [4, 5]]


def test_a_cache_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens is longer than .* 64"):
        init_cache(CONFIG, 1, 65, jnp.float32)


@pytest.mark.slow
def test_an_empty_cache_changes_nothing_and_costs_nothing(model):
    """The work does not grow with the capacity, only with the tokens."""
    config, params = model
    texts, capacity = ids(2, T), 37

    def run(params, is_empty):
        cache = init_cache(config, 2, capacity, jnp.float32)
        cache = dataclasses.replace(cache, is_empty=is_empty)
        return forward(config, params, texts, cache=cache, taps=(Tap("attn_probs"),))

    empty, plain = (jax.jit(partial(run, is_empty=e))(params) for e in (True, False))
    full = jax.jit(lambda p: forward(config, p, texts).logits)(params)
    np.testing.assert_allclose(empty.logits, full, atol=1e-5)
    np.testing.assert_allclose(empty.logits, plain.logits, atol=1e-4)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (empty.cache, plain.cache)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not empty.cache.is_empty
    probs, all_probs = (x.trace["attn_probs"] for x in (empty, plain))
    assert probs.shape[-1] == T and all_probs.shape[-1] == capacity
    np.testing.assert_allclose(probs, all_probs[..., :T], atol=1e-5)

    def scores(is_empty):
        """Whether attention visits the whole cache."""
        jaxpr = jax.make_jaxpr(partial(run, is_empty=is_empty))(params)
        return f",{T},{capacity}]" in str(jaxpr)

    assert scores(False) and not scores(True)
