"""A block of one's own: its parameters, in every way that layers are run."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import ids, loud, small

from jaxlm import tree
from jaxlm.model.block import Attention, Block, FeedForward, Norm
from jaxlm.model.initialization import init, init_cache
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap
from jaxlm.tree import unstack

CONFIG = small(num_layers=3, layer_pattern=("local", "global"), window=4)


class Adapted(Block):
    """Adds a product of two thin matrices of its own, which begins at 0."""

    @nn.compact
    def __call__(self, x, context, cache, probe):
        y, cache = super().__call__(x, context, cache, probe)
        D = self.config.model_dim
        down = self.param("adapter_down", nn.initializers.normal(0.1), (D, 2))
        up = self.param("adapter_up", nn.initializers.zeros, (2, D))
        return y + (x @ down) @ up, cache


class Parallel(Block):
    """Attention and feed-forward read the same norm, as `parallel_block` does."""

    @nn.compact
    def __call__(self, x, context, cache, probe):
        x = probe("resid_pre", x)
        attention = Attention(self.config, self.kind, name="attn")
        h = Norm(self.config, "layers/attn_norm", name="attn_norm")(x)
        a, cache = attention(h, context, cache, probe)
        m = FeedForward(self.config, name="mlp")(
            Norm(self.config, "layers/mlp_norm", name="mlp_norm")(x), probe
        )
        return probe("resid_post", x + a + m), cache


def adapted(config, seed=0):
    params = loud(jax.jit(partial(init, config, block=Adapted))(jax.random.key(seed)))
    up = jax.random.normal(jax.random.key(9), (config.num_layers, 2, config.model_dim))
    return tree.replace(params, "layers/adapter_up", up)


@pytest.mark.slow
def test_own_parameters_are_drawn_beside_those_of_the_table():
    key = jax.random.key(4)
    plain = jax.jit(partial(init, CONFIG))(key)
    own = jax.jit(partial(init, CONFIG, block=Adapted))(key)
    names = set(tree.flatten(own)) - set(tree.flatten(plain))
    assert names == {"layers/adapter_down", "layers/adapter_up"}
    down = own["layers"]["adapter_down"]
    assert down.shape == (3, 24, 2) and down.dtype == jnp.float32
    assert len(np.unique(down)) == down.size  # each layer has its own
    for name, value in tree.flatten(plain).items():
        np.testing.assert_array_equal(value, tree.flatten(own)[name])


@pytest.mark.slow
def test_a_block_may_compute_what_another_config_does():
    config = small()
    params = loud(jax.jit(partial(init, config))(jax.random.key(0)))
    tokens = ids(2, 9)
    parallel = dataclasses.replace(config, parallel_block=True)
    wanted = jax.jit(partial(forward, parallel))(params, tokens)
    ours = jax.jit(partial(forward, config, block=Parallel))(params, tokens)
    np.testing.assert_allclose(ours.logits, wanted.logits, rtol=1e-6, atol=1e-6)
    sequential = jax.jit(partial(forward, config))(params, tokens)
    assert not np.allclose(ours.logits, sequential.logits)


@pytest.mark.slow
def test_all_ways_to_run_layers_agree():
    """A scan (with a layer left over), a loop, a tuple, and with remat."""
    params, tokens = adapted(CONFIG), ids(2, 9)
    taps = (Tap("resid_post", layers=(0, 2)), Tap("attn_probs"))

    def run(config, params):
        out = forward(config, params, tokens, taps=taps, block=Adapted)
        return out.logits, out.trace

    wanted = jax.jit(partial(run, CONFIG))(params)
    plain = {n: v for n, v in params["layers"].items() if "adapter" not in n}
    logits = jax.jit(partial(forward, CONFIG))(
        {**params, "layers": plain}, tokens
    ).logits
    assert not np.allclose(wanted[0], logits)

    def close(got):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, wanted
        )

    unrolled = dataclasses.replace(CONFIG, unroll_layers=0)
    close(jax.jit(partial(run, unrolled))(params))
    separate = {**params, "layers": unstack(params["layers"], 3)}
    close(jax.jit(partial(run, CONFIG))(separate))

    def gradient(remat):
        def loss(params):
            config = dataclasses.replace(CONFIG, remat=remat)
            return jnp.square(run(config, params)[0]).mean()

        return jax.jit(jax.grad(loss))(params)

    grads = gradient("none")
    assert np.abs(grads["layers"]["adapter_down"]).min() > 0
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        gradient("full"),
        grads,
    )


@pytest.mark.slow
def test_a_cache():
    params, tokens = adapted(CONFIG), ids(1, 9)
    run = jax.jit(partial(forward, CONFIG, block=Adapted))
    whole = run(params, tokens).logits
    first = run(params, tokens[:, :5], cache=init_cache(CONFIG, 1, 16, jnp.float32))
    rest = run(params, tokens[:, 5:], cache=first.cache)
    parts = np.concatenate([first.logits, rest.logits], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_what_a_block_does_not_record():
    params, tokens = jax.jit(partial(init, small()))(jax.random.key(0)), ids(1, 4)
    with pytest.raises(ValueError) as error:
        forward(small(), params, tokens, taps=(Tap("attn_in"),), block=Parallel)
    assert "Parallel does not record 'attn_in'" in str(error.value)


def test_parameters_of_a_block_without_the_block():
    with pytest.raises(ValueError) as error:
        forward(CONFIG, adapted(CONFIG), ids(1, 4))
    assert "layers/adapter_down" in str(error.value) and "block=" in str(error.value)
