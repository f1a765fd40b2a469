"""Rotation as multiplication of complex numbers; sinusoids by the paper's formula.

The scalings are compared with transformers in tests/model/test_positions.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal

from jaxlm.ops import rope

POSITIONS = np.array([[0, 1, 5, 1000], [3, 3, 9, 7]], np.int32)


def turned(x, positions, rotary_dim, theta):
    """Multiplies pair (i, i + R/2) of each head by exp(i * angle), in float64."""
    x = np.float64(x)
    half = rotary_dim // 2
    frequency = np.array([theta ** (-2 * i / rotary_dim) for i in range(half)])
    angle = positions[:, :, None, None] * frequency
    z = (x[..., :half] + 1j * x[..., half:rotary_dim]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag, x[..., rotary_dim:]], axis=-1)


@pytest.mark.parametrize("rotary_dim", [8, 4], ids=["whole head", "half a head"])
def test_rotation(rotary_dim):
    x = normal(1, 2, 4, 3, 8)
    frequency = rope.frequencies(rotary_dim, 500.0)
    y = rope.rotate(jnp.asarray(x), *rope.rotation(jnp.asarray(POSITIONS), frequency))
    # An angle of 1000 in f32 is exact to 6e-5.
    np.testing.assert_allclose(y, turned(x, POSITIONS, rotary_dim, 500.0), atol=3e-4)
    np.testing.assert_array_equal(y[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("rotary_dim", [8, 4], ids=["whole head", "half a head"])
def test_gradient_turns_back(rotary_dim):
    x, g = jnp.asarray(normal(1, 2, 4, 3, 8)), jnp.asarray(normal(2, 2, 4, 3, 8))
    cos, sin = rope.rotation(
        jnp.asarray(POSITIONS), rope.frequencies(rotary_dim, 500.0), 1.3
    )
    _, pull = jax.vjp(lambda x: rope.rotate(x, cos, sin), x)
    # A linear map: <g, R x> = <R^T g, x> for every x.
    (back,) = pull(g)
    y = rope.rotate(x, cos, sin)
    assert jnp.vdot(g, y) == pytest.approx(float(jnp.vdot(back, x)), rel=1e-5)
    other = jnp.asarray(normal(3, 2, 4, 3, 8))
    right = float(jnp.vdot(g, rope.rotate(other, cos, sin)))
    assert jnp.vdot(back, other) == pytest.approx(right, rel=1e-4)


def test_scores_depend_on_the_distance_alone():
    q, k = jnp.asarray(normal(1, 1, 1, 1, 16)), jnp.asarray(normal(2, 1, 1, 1, 16))

    def score(a, b):
        at = [
            rope.rotation(jnp.array([[p]]), rope.frequencies(16, 100.0)) for p in (a, b)
        ]
        return float(jnp.vdot(rope.rotate(q, *at[0]), rope.rotate(k, *at[1])))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 0.1


def test_bfloat16_is_rounded_once():
    x = jnp.asarray(normal(1, 2, 4, 3, 8)).astype(jnp.bfloat16)
    at = rope.rotation(jnp.asarray(POSITIONS), rope.frequencies(8, 500.0))
    y = rope.rotate(x, *at)
    assert y.dtype == jnp.bfloat16
    right = turned(x, POSITIONS, 8, 500.0)
    np.testing.assert_allclose(np.float64(y), right, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("width", [10, 7, 2])
def test_sinusoids(width):
    table = rope.sinusoids(jnp.asarray(POSITIONS), width)
    half = width // 2
    for (b, t), position in np.ndenumerate(POSITIONS):
        for i in range(half):
            angle = position / 10_000 ** (i / max(half - 1, 1))
            assert table[b, t, i] == pytest.approx(math.sin(angle), abs=3e-4)
            assert table[b, t, half + i] == pytest.approx(math.cos(angle), abs=3e-4)
    assert not table[..., 2 * half :].any()
