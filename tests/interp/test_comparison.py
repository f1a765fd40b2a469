"""Two values beside each other, from the definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal

from jaxlm.interp.comparison import (
    cosine,
    kl_divergence,
    parameter_change,
    relative_distance,
)


def test_angles_distances_and_divergences():
    x, y = normal(0, 3, 4, 7), normal(1, 3, 4, 7)
    lengths = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    args = jnp.asarray(x), jnp.asarray(y)
    wanted = (x * y).sum(-1) / (lengths[0] * lengths[1])
    np.testing.assert_allclose(cosine(*args), wanted, rtol=1e-4)
    assert float(cosine(jnp.zeros(2), jnp.ones(2))) == 0.0
    wanted = np.linalg.norm(x - y, axis=-1) / lengths[0]
    np.testing.assert_allclose(relative_distance(*args), wanted, rtol=1e-5)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y))
    wanted = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(kl_divergence(*args), wanted, rtol=1e-3, atol=1e-6)
    masked = jnp.array([0.0, -jnp.inf]), jnp.array([0.0, 0.0])
    assert float(kl_divergence(*masked)) == pytest.approx(np.log(2))


def test_parameters_of_two_checkpoints():
    params = {"layers": {"q": jnp.ones((2, 3, 4))}, "embed": {"table": jnp.ones(5)}}
    other = {
        "layers": {"q": params["layers"]["q"].at[1].mul(1.5)},
        "embed": {"table": 3 * jnp.ones(5)},
    }
    change = parameter_change(params, other)
    np.testing.assert_allclose(change["layers/q"], [0, 0.5], atol=1e-6)
    assert float(change["embed/table"]) == pytest.approx(2)
    with pytest.raises(ValueError, match="two different models"):
        parameter_change(params, {**other, "embed": {"table": jnp.ones(6)}})
