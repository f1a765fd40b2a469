"""Compares norms and their gradients with float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal, slope

from jaxlm.ops.norm import divisor, normalize

KINDS = ("rms", "rms_unit_offset", "layer")
# Large compared with the variance of `x`, so that misplacing it would show.
EPSILON = 0.3


def oracle(x, scale, bias, kind, epsilon=EPSILON):
    x, scale = np.float64(x), np.float64(scale)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    y = y * (1 + scale if kind == "rms_unit_offset" else scale)
    return y if bias is None else y + np.float64(bias)


def inputs(kind):
    # A mean far from 0 distinguishes LayerNorm from RMSNorm.
    x, scale = normal(1, 3, 5, 16) + 2, normal(2, 16)
    return x, scale, normal(3, 16) if kind == "layer" else None


@pytest.mark.parametrize("kind", KINDS)
def test_value(kind):
    x, scale, bias = jax.tree.map(jnp.asarray, inputs(kind))
    expected = oracle(x, scale, bias, kind)
    np.testing.assert_allclose(
        normalize(x, scale, bias, EPSILON, kind), expected, atol=2e-6
    )


def test_layer_norm_without_bias():
    x, scale, _ = jax.tree.map(jnp.asarray, inputs("layer"))
    expected = oracle(x, scale, None, "layer")
    y = normalize(x, scale, None, EPSILON, "layer")
    np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind):
    x, scale, bias = inputs(kind)
    weight = normal(4, *x.shape)
    arrays = [a for a in (x, scale, bias) if a is not None]

    def ours(*arrays):
        given = arrays if len(arrays) == 3 else (*arrays, None)
        return jnp.sum(normalize(*given, EPSILON, kind) * weight)

    grads = jax.jit(jax.grad(ours, range(len(arrays))))(*map(jnp.asarray, arrays))
    for place, grad in enumerate(grads):

        def right(a, place=place):
            given = [*arrays[:place], a, *arrays[place + 1 :]]
            given = given if len(given) == 3 else [*given, None]
            return np.sum(oracle(*given, kind) * weight)

        direction = normal(5, *arrays[place].shape)
        expected = slope(right, arrays[place], direction)
        assert np.sum(grad * direction) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_computed_in_float32(kind):
    """Rounds the normalized x and the result to 8 bits, and nothing else."""
    x, scale, bias = jax.tree.map(jnp.asarray, inputs(kind))
    x = x.astype(jnp.bfloat16)
    y = normalize(x, scale, bias, EPSILON, kind)
    assert y.dtype == jnp.bfloat16
    expected = oracle(x, scale, bias, kind)
    np.testing.assert_allclose(np.float32(y), expected, atol=3e-2)
    found = divisor(x, EPSILON, kind)
    assert found.dtype == jnp.float32
    x = np.float64(x)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    right = np.sqrt(np.square(x).mean(-1, keepdims=True) + EPSILON)
    np.testing.assert_allclose(found, right, rtol=1e-6)


def test_large_and_zero_inputs_are_finite():
    for kind in KINDS:
        for x in (jnp.zeros((1, 8)), jnp.full((1, 8), 1e15)):
            grad = jax.grad(
                lambda x, k=kind: normalize(x, jnp.ones(8), None, 1e-6, k).sum()
            )
            assert np.isfinite(grad(x)).all()
