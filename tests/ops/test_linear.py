"""Compares `einsum` with NumPy's in float64: values, gradients and dtypes."""

import math
import re
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks_case import slow_but
from ops_case import normal

from jaxlm.config import MeshConfig
from jaxlm.ops import linear
from jaxlm.ops.linear import compute_dtype, einsum, reads_outputs_first
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.types import OutputsFirst

# Each equation of the model: (shape of x, shape of w).
EQUATIONS = {
    "BTD,DNH->BTNH": ((2, 5, 12), (12, 6, 4)),
    "BTNH,NHD->BTD": ((2, 5, 6, 4), (6, 4, 12)),
    "BTNH,NHD->BTND": ((2, 5, 6, 4), (6, 4, 12)),
    "BTD,DF->BTF": ((2, 5, 12), (12, 20)),
    "BTF,FD->BTD": ((2, 5, 20), (20, 12)),
    "BTD,VD->BTV": ((2, 5, 12), (20, 12)),
}


def gradients(equation, x, w, g):
    """By definition each gradient is an einsum of the other two arrays."""
    inputs, out = equation.split("->")
    a, b = inputs.split(",")
    dx = np.einsum(f"{out},{b}->{a}", np.float64(g), np.float64(w))
    dw = np.einsum(f"{a},{out}->{b}", np.float64(x), np.float64(g))
    return dx, dw


@pytest.mark.parametrize("rows", [2, 1], ids=["batch", "one row"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_value_and_gradient(equation, rows):
    shape, w_shape = EQUATIONS[equation]
    x, w = normal(1, rows, *shape[1:]), normal(2, *w_shape)
    expected = np.einsum(equation, np.float64(x), np.float64(w))
    g = normal(3, *expected.shape)
    arrays = jnp.asarray(x), jnp.asarray(w)
    y, pull = jax.vjp(lambda x, w: einsum(equation, x, w), *arrays)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for ours, right in zip(
        pull(jnp.asarray(g)), gradients(equation, x, w, g), strict=True
    ):
        np.testing.assert_allclose(ours, right, atol=2e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_gpu_multiplies_one_row_without_matrix_units(monkeypatch, equation):
    monkeypatch.setattr(linear, "target", lambda: ("gpu", "a card"))
    shape, w_shape = EQUATIONS[equation]
    x, w = normal(1, 1, 1, *shape[2:]), normal(2, *w_shape)
    product = jax.jit(lambda x, w: einsum(equation, x, w))
    expected = np.einsum(equation, np.float64(x), np.float64(w))
    np.testing.assert_allclose(product(x, w), expected, atol=1e-5)
    assert "dot_general" not in str(product.trace(x, w).jaxpr)


# XLA:CPU has no bf16 einsum with a batch dimension (heads); the model computes it in
# f32.
@pytest.mark.parametrize("equation", sorted(set(EQUATIONS) - {"BTNH,NHD->BTND"}))
def test_bfloat16(equation):
    """Results are bf16, sums f32, and the parameter's gradient f32."""
    shape, w_shape = EQUATIONS[equation]
    x, w = jnp.asarray(normal(1, *shape)).astype(jnp.bfloat16), normal(2, *w_shape)
    rounded = np.float64(jnp.asarray(w).astype(jnp.bfloat16))
    expected = np.einsum(equation, np.float64(x), rounded)
    g = jnp.asarray(normal(3, *expected.shape)).astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: einsum(equation, x, w), x, jnp.asarray(w))
    assert y.dtype == jnp.bfloat16
    # One rounding to 8 bits; sums of bf16 numbers would be off by much more.
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-3)
    # A single row takes another way.
    alone = einsum(equation, x[:1, :1], jnp.asarray(w))
    assert alone.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float64(alone), expected[:1, :1], rtol=2**-8, atol=1e-3
    )
    dx, dw = pull(g)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    right_dx, right_dw = gradients(equation, x, rounded, g)
    np.testing.assert_allclose(np.float64(dx), right_dx, rtol=2**-8, atol=1e-3)
    np.testing.assert_allclose(dw, right_dw, rtol=1e-5, atol=1e-4)


def test_axes_are_summed_in_the_order_in_which_they_lie():
    """XLA:CPU writes neither operand anew."""
    x, w = jnp.zeros((2, 32, 6, 16)), jnp.zeros((6, 16, 96))
    product = jax.jit(partial(einsum, "BTNH,NHD->BTD"))
    text = product.lower(x, w).compile().as_text()
    assert " copy(" not in text and " transpose(" not in text


def test_a_cpu_multiplies_one_bfloat16_row_without_a_copy_of_the_matrix():
    x = jnp.asarray(normal(1, 1, 1, 64)).astype(jnp.bfloat16)
    w = jnp.asarray(normal(2, 512, 64)).astype(jnp.bfloat16)
    product = jax.jit(lambda x, w: einsum("BTD,VD->BTV", x, w))
    assert "f32[512,64]" not in product.lower(x, w).compile().as_text()


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16"])
@pytest.mark.parametrize("rows, meshed", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("equation", sorted(set(EQUATIONS) - {"BTNH,NHD->BTND"}))
def test_few_rows_multiply_a_matrix_where_it_lies(
    monkeypatch, equation, rows, meshed, unit
):
    """XLA:CPU neither copies it nor writes it in f32."""
    native = compute_dtype("auto") == jnp.bfloat16
    monkeypatch.setattr(linear, "_cpu_flags", lambda: frozenset([unit]))
    x_axes, w_axes = equation.partition("->")[0].split(",")
    sizes = dict(B=1, T=rows, D=96, N=6, H=16, F=160, V=256)
    x, w = (normal(n, *(sizes[a] for a in s)) for n, s in enumerate((x_axes, w_axes)))
    x, w = (jnp.asarray(a).astype(jnp.bfloat16) for a in (x, w))
    outputs = [a for a in w_axes if a not in x_axes]
    first = outputs + [a for a in w_axes if a in x_axes]
    lying = w  # the table of tokens as it is
    if "".join(first) != w_axes:
        lying = w.transpose([w_axes.index(axis) for axis in first])
        lying = lying.reshape(-1, *lying.shape[len(outputs) :])
        lying = OutputsFirst(lying, w.shape, len(outputs))
    assert lying.shape == w.shape

    @jax.jit
    def product(x, lying):
        return einsum(equation, x, lying, out_dtype=jnp.float32)

    expected = np.einsum(equation, np.float64(x), np.float64(w))
    mesh, placed = nullcontext(), None
    if meshed:  # of one device, as commands have it
        devices = make_mesh_of_size(MeshConfig(data=1))
        mesh, placed = jax.set_mesh(devices), NamedSharding(devices, P())
    with mesh:
        x, lying = jax.device_put((x, lying), placed)
        np.testing.assert_allclose(product(x, lying), expected, rtol=1e-5, atol=1e-5)
        text = product.lower(x, lying).compile().as_text()
    written = re.findall(r"= \w+\[([\d,]+)\]\S* (\S+)\(", text)
    whole = [
        operation
        for shape, operation in written
        if math.prod(map(int, shape.split(","))) == w.size
    ]
    assert not native or set(whole) <= {"parameter", "bitcast"}, whole


@pytest.mark.parametrize("rows", slow_but([3], [1, 3]))
def test_matrices_that_lie_in_one_array_are_one_product(monkeypatch, rows):
    """Queries of 6 heads and keys of 2."""
    monkeypatch.setattr(linear, "_cpu_flags", lambda: frozenset(["amx_bf16"]))
    x = jnp.asarray(normal(0, 1, rows, 96)).astype(jnp.bfloat16)
    w = jnp.asarray(normal(1, 96, 8, 16)).astype(jnp.bfloat16)
    joined = w.transpose(1, 2, 0).reshape(8 * 16, 96)

    @jax.jit
    def products(x, joined):
        q = OutputsFirst(joined, (96, 6, 16), 2)
        k = OutputsFirst(joined, (96, 2, 16), 2, first=6 * 16)
        return tuple(einsum("BTD,DNH->BTNH", x, part) for part in (q, k))

    y = np.concatenate(products(x, joined), axis=2)
    expected = np.einsum("BTD,DNH->BTNH", np.float64(x), np.float64(w))
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-5)
    text = products.lower(x, joined).compile().as_text()
    assert len(re.findall(r"= \S+ dot\(", text)) == 1
    # Elsewhere each is multiplied by itself.
    monkeypatch.setattr(linear, "_cpu_flags", lambda: frozenset())
    jax.clear_caches()
    y = np.concatenate(products(x, joined), axis=2)
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-5)


def test_where_few_rows_read_outputs_first(monkeypatch):
    def reads(rows, dtype, flags):
        monkeypatch.setattr(linear, "_cpu_flags", lambda: frozenset(flags))
        return reads_outputs_first(rows, jnp.dtype(dtype))

    assert reads(1, "bfloat16", ["amx_bf16"]) and reads(32, "bfloat16", ["avx512_bf16"])
    assert not reads(33, "bfloat16", ["amx_bf16"])
    assert not reads(1, "float32", ["amx_bf16"])
    assert not reads(1, "bfloat16", ["avx2"])


def test_out_dtype():
    """Logits are f32 sums, never rounded to bf16."""
    x, w = normal(1, 2, 3, 64), normal(2, 64, 8)
    x16 = jnp.asarray(x).astype(jnp.bfloat16)
    y = einsum("BTD,DV->BTV", x16, jnp.asarray(w), out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    w16 = np.float64(jnp.asarray(w).astype(jnp.bfloat16))
    expected = np.einsum("BTD,DV->BTV", np.float64(x16), w16)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_compute_dtype(monkeypatch):
    assert compute_dtype("float32") == jnp.float32
    assert compute_dtype("bfloat16") == jnp.bfloat16
    from jaxlm.ops import linear

    for native, dtype in ((True, jnp.bfloat16), (False, jnp.float32)):
        monkeypatch.setattr(linear, "_cpu_multiplies_bfloat16", lambda n=native: n)
        assert compute_dtype("auto") == dtype
