"""Products with quantized weights, against NumPy's of `values * scale` in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_case import normal
from test_linear import EQUATIONS

from jaxlm.ops.embedding import lookup
from jaxlm.ops.experts.grouped_matmul import IMPLEMENTATIONS, grouped_matmul
from jaxlm.ops.linear import einsum
from jaxlm.ops.quantization import dequantize_weight, quantize_weight


def exact(w):
    """The weight that the integers and scales stand for, float64."""
    scale = np.float64(w.scale)
    for axis, (size, count) in enumerate(zip(w.shape, scale.shape, strict=True)):
        scale = scale.repeat(size // count, axis)
    return np.float64(w.values.astype(jnp.int32)) * scale


def inputs_of(equation):
    """Axes of the weight that the product sums over."""
    inputs, out = equation.split("->")
    return [i for i, letter in enumerate(inputs.split(",")[1]) if letter not in out]


@pytest.mark.parametrize("kind, levels", [("int8", 127), ("int4", 7)])
def test_rounding_is_to_the_nearest_level(kind, levels):
    w = normal(1, 64, 2, 48)
    w[:32, 0, 0] = 0  # a whole block of zeros
    w[:, 1, 1] *= 1000  # an output of another size does not spoil the others
    quantized = quantize_weight(jnp.asarray(w), [0], kind)
    blocks = w.reshape(1 if kind == "int8" else 2, -1, 2, 48)
    largest = np.abs(blocks).max(axis=1)
    right = np.where(largest, largest, levels) / levels
    np.testing.assert_allclose(quantized.scale, right, rtol=1e-6)
    error = np.abs(exact(quantized) - w).reshape(blocks.shape)
    assert (error <= quantized.scale[:, None] * 0.5001).all()
    assert np.abs(np.int32(quantized.values.astype(jnp.int32))).max() == levels
    assert not exact(quantized)[:32, 0, 0].any()
    dense = dequantize_weight(quantized, jnp.float32)
    np.testing.assert_allclose(dense, exact(quantized), rtol=1e-6)


ENTRIES = [(equation, "int8") for equation in EQUATIONS if equation[-2:] != "ND"]
ENTRIES += [(equation, "int4") for equation in ("BTNH,NHD->BTD", "BTD,VD->BTV")]
ENTRIES = [(*entry, 6) for entry in ENTRIES]
# One row is multiplied in another way.
ENTRIES += [(equation, "int4", 1) for equation in ("BTNH,NHD->BTD", "BTD,DNH->BTNH")]


@pytest.mark.parametrize("equation, kind, rows", ENTRIES)
def test_products(equation, kind, rows):
    """Blocks of 32 along the last input axis, where it has as many."""
    sizes = dict(B=1, T=rows, D=64, N=3, H=32, F=96, V=20)
    x_letters, w_letters = equation.split("->")[0].split(",")
    x, w = (
        normal(i, *(sizes[c] for c in s)) for i, s in enumerate((x_letters, w_letters))
    )
    quantized = quantize_weight(jnp.asarray(w), inputs_of(equation), kind)
    right = np.einsum(equation, np.float64(x), exact(quantized))
    y, pull = jax.vjp(lambda x: einsum(equation, x, quantized), jnp.asarray(x))
    np.testing.assert_allclose(y, right, atol=5e-5)
    # The activations have a gradient, as looking inside needs it.
    g = normal(3, *right.shape)
    (dx,) = pull(jnp.asarray(g))
    back = f"{equation.split('->')[1]},{w_letters}->{x_letters}"
    right = np.einsum(back, np.float64(g), exact(quantized))
    np.testing.assert_allclose(dx, right, atol=1e-4)


def test_int8_rounds_no_weight_to_bfloat16():
    """Integers are exact in bfloat16, and scales multiply sums in f32."""
    x, w = jnp.asarray(normal(1, 2, 3, 64)).astype(jnp.bfloat16), normal(2, 64, 40)
    quantized = quantize_weight(jnp.asarray(w), [0], "int8")
    y = einsum("BTD,DV->BTV", x, quantized, out_dtype=jnp.float32)
    right = np.einsum("BTD,DV->BTV", np.float64(x), exact(quantized))
    np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matrices_of_experts(implementation, kind):
    counts, x = [2, 0, 5, 1], normal(1, 8, 64)
    w = quantize_weight(jnp.asarray(normal(2, 4, 64, 24)), [1], kind)
    groups = np.repeat(range(4), counts)

    def product(x):
        sizes = jnp.asarray(counts)
        return grouped_matmul(x, w, sizes, implementation=implementation)

    y, pull = jax.vjp(product, jnp.asarray(x))
    right = np.stack(
        [np.float64(r) @ exact(w)[e] for r, e in zip(x, groups, strict=True)]
    )
    np.testing.assert_allclose(y, right, atol=5e-5)
    (dx,) = pull(jnp.asarray(right, jnp.float32))
    back = np.stack([exact(w)[e] @ r for r, e in zip(right, groups, strict=True)])
    np.testing.assert_allclose(dx, back, rtol=1e-4, atol=1e-3)


def test_rows_of_a_table():
    table = quantize_weight(jnp.asarray(normal(1, 20, 64)), [1], "int8")
    ids = jnp.array([[3, 19, 3], [0, 7, 1]])
    rows = lookup(table, ids, jnp.float32)
    np.testing.assert_allclose(rows, exact(table)[np.asarray(ids)], rtol=1e-6)
