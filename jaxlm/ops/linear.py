"""The einsum through which parameters multiply (but for experts, see `moe.py`).

It asks for f32 accumulation, casts the parameter once, and gives XLA:CPU the forms
that it runs fast, forward and backward; on accelerators the same forms are as good.
"""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxlm.ops.collectives import (
    all_gather,
    compiler_scatters,
    shared_axes,
    sum_over_tokens,
)
from jaxlm.ops.layout import layout


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype that a config's `dtype` stands for on the default device.

    `auto` is bfloat16 on accelerators and on CPUs that multiply it natively
    (AVX512-BF16 or AMX, as Linux reports), else float32.
    """
    if name == "auto":
        native = jax.default_backend() != "cpu" or _cpu_multiplies_bfloat16()
        name = "bfloat16" if native else "float32"
    return jnp.dtype(name)


@cache
def _cpu_multiplies_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return False
    flags = info.read_text().partition("flags")[2].partition("\n")[0].split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def einsum(
    equation: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    out_sharding: P | None = None,
    out_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "..."]:
    """`einsum(equation, x, w)` of an activation and a parameter.

    The parameter is rounded to x's dtype, sums are kept in f32, and the gradient of
    the parameter stays in the parameter's dtype.

    Args:
      equation: with an explicit output; each letter of x is in w or in the output, and
        each letter of w in x or in the output.
      out_sharding: layout of the result where the mesh makes it ambiguous.
      out_dtype: dtype of the result; None is x's.
      precision: of f32 inputs on accelerators, which otherwise use fewer bits; forward
        and backward.
    """
    y = jnp.einsum(
        equation,
        x,
        _gathered(w, x),
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    return y.astype(x.dtype if out_dtype is None else out_dtype)


def _gathered(w: Array, x: Array) -> Array:
    """Returns w in x's dtype, whole along the mesh axes that cut both."""
    axes = shared_axes(w, x)
    if not axes:
        return w.astype(x.dtype)
    sharding = layout(w)
    assert sharding is not None
    return all_gather(w.astype(x.dtype), sharding.spec, axes)


def _einsum_forward(equation, x, w, out_sharding, out_dtype, precision):
    # Gathered once in a pass, here, and used twice in the backward pass of a layer
    # that is computed again.
    whole = _gathered(w, x)
    y = einsum(equation, x, whole, out_sharding, out_dtype, precision)
    return y, (x, w, whole if shared_axes(w, x) else None)


def _einsum_backward(equation, out_sharding, out_dtype, precision, residuals, g):
    x, w, whole = residuals
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    # Cotangents are rounded to the compute dtype so that both products of the
    # backward pass run in it; their sums are f32 again.
    g = g.astype(x.dtype)
    f32_sums = partial(
        jnp.einsum, precision=precision, preferred_element_type=jnp.float32
    )
    dx = f32_sums(
        f"{out},{w_axes}->{x_axes}",
        g,
        w.astype(x.dtype) if whole is None else whole,
        out_sharding=layout(x),
    )
    gradient = partial(f32_sums, f"{x_axes},{out}->{w_axes}")
    with jax.named_scope("weight_gradient"):
        if whole is None or compiler_scatters(shared_axes(w, x)):
            dw = gradient(x, g, out_sharding=layout(w))
        else:
            dw = sum_over_tokens(gradient, (x, g), like=w)
    return dx.astype(x.dtype), dw.astype(w.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)
