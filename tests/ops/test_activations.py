"""Compares activations and gradients with closed forms in Python's `math`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal

from jaxlm.ops.activations import ACTIVATIONS, FACTORS, activate

CLOSED = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "swiglu_clamped": lambda x: min(x, 7.0) / (1 + math.exp(-1.702 * min(x, 7.0))),
}
CLOSED_FACTORS = {"swiglu_clamped": lambda up: np.clip(up, -7, 7) + 1}


def factor(name):
    """Returns the factor that `up` becomes."""
    return CLOSED_FACTORS.get(name, lambda up: up)


X = np.concatenate([np.linspace(-9, 9, 40), [0.1, -0.1]]).astype(np.float32)
# Beyond both clamps of gpt-oss.
UP = 5 * normal(1, len(X))


def test_every_activation_is_tested():
    assert set(CLOSED) == set(ACTIVATIONS)
    assert set(CLOSED_FACTORS) == set(FACTORS)
    assert UP.min() < -7.1 and UP.max() > 7.1


@pytest.mark.parametrize("name", CLOSED)
def test_value_and_slope(name):
    f = CLOSED[name]
    values = np.array([f(float(x)) for x in X])
    slopes = np.array([(f(x + 1e-6) - f(x - 1e-6)) / 2e-6 for x in X.astype(float)])
    for up in (None, jnp.asarray(UP)):
        by = 1.0 if up is None else factor(name)(UP)
        ours = activate(jnp.asarray(X), up, name)
        np.testing.assert_allclose(ours, values * by, rtol=1e-6, atol=3e-6)
        which = (0,) if up is None else (0, 1)
        grads = jax.grad(lambda p, u: activate(p, u, name).sum(), which)(
            jnp.asarray(X), up
        )
        np.testing.assert_allclose(grads[0], slopes * by, rtol=1e-5, atol=1e-5)
        if up is not None:
            high, low = (factor(name)(UP.astype(float) + e) for e in (1e-6, -1e-6))
            by = (high - low) / 2e-6
            np.testing.assert_allclose(grads[1], values * by, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", CLOSED)
def test_bfloat16_is_rounded_once(name):
    x = jnp.asarray(X).astype(jnp.bfloat16)
    up = jnp.asarray(UP).astype(jnp.bfloat16)
    y = activate(x, up, name)
    assert y.dtype == jnp.bfloat16
    right = np.array([CLOSED[name](float(a)) for a in x])
    right *= factor(name)(np.float64(up))
    # Half a step of 8 bits, relative.
    np.testing.assert_allclose(np.float64(y), right, rtol=2**-8, atol=1e-4)


def test_the_gelus_differ():
    """They differ by more than the tolerance of their tests."""
    exact, tanh = (activate(jnp.asarray(X), None, n) for n in ("gelu", "gelu_tanh"))
    assert np.abs(exact - tanh).max() > 1e-4
