"""What a cache holds is what its taps say it holds."""

import jax
import jax.numpy as jnp
import numpy as np
from model_case import ids, make, small
from ops_case import normal

from jaxlm.interp.cache_contents import bytes_per_token, cache_contents, read_mass
from jaxlm.model.initialization import init_cache
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap


def test_lengths_are_those_of_the_real_cache_and_its_bytes():
    config, params = make(small(layer_pattern=("local", "global"), window=4))
    taps = (Tap("k_rot"), Tap("v"))

    @jax.jit
    def run(params):
        cache = init_cache(config, 2, 7, jnp.float32)
        out = forward(config, params, ids(2, 7), cache=cache, taps=taps)
        seen = cache_contents(config, out.trace["k_rot"], out.trace["v"])
        return out.cache.layers, seen.key_lengths, seen.value_lengths

    layers, keys, values = run(params)
    np.testing.assert_allclose(keys, np.linalg.norm(layers.keys, axis=-1), rtol=1e-5)
    wanted = np.linalg.norm(layers.values, axis=-1)
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    visible = cache_contents(config, layers.keys, layers.values).visible
    # The next token is number 7: with a window of 4 it sees 4, 5, 6 and itself.
    assert visible[0].tolist() == [False] * 4 + [True] * 3 and visible[1].all()
    assert bytes_per_token(config) * 2 * 7 == layers.keys.nbytes + layers.values.nbytes


def test_read_mass():
    probs = abs(normal(0, 2, 1, 3, 5, 5))
    np.testing.assert_allclose(read_mass(jnp.asarray(probs)), probs.sum(-2), rtol=1e-5)
