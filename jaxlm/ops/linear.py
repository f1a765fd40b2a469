"""The einsum through which parameters multiply (but for experts, see `moe.py`).

It asks for f32 accumulation, casts the parameter once, and gives XLA:CPU the forms
that it runs fast, forward and backward; on accelerators the same forms are as good, but
for a single row, which GPUs and CPUs multiply in forms of their own.
"""

import math
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from jaxlm.ops.attention.request import target
from jaxlm.ops.collectives import (
    all_gather,
    axes_of,
    compiler_scatters,
    gathered_axes,
    sum_over_tokens,
)
from jaxlm.ops.layout import cotangent_layout, layout, reshape
from jaxlm.ops.quantization import dequantize_weight
from jaxlm.types import OutputsFirst, Quantized

# XLA:CPU multiplies up to so many rows of bfloat16 faster by [outputs, inputs].
FEW_ROWS = 32


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype that a config's `dtype` stands for on the default device.

    `auto` is bfloat16 on accelerators and on CPUs that multiply it natively
    (AVX512-BF16 or AMX, as Linux reports), else float32.
    """
    if name == "auto":
        native = jax.default_backend() != "cpu" or _cpu_multiplies_bfloat16()
        name = "bfloat16" if native else "float32"
    return jnp.dtype(name)


def _cpu_multiplies_bfloat16() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


@cache
def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset()
    return frozenset(info.read_text().partition("flags")[2].partition("\n")[0].split())


def reads_outputs_first(num_rows: int, dtype: DTypeLike) -> bool:
    """Whether a device multiplies so many rows fastest by [outputs, inputs].

    GPUs do with one row, and CPUs with bfloat16 units with few rows of bfloat16.
    """
    if target()[0] == "gpu":
        return num_rows == 1
    return _are_few_on_cpu(num_rows, dtype)


def _are_few_on_cpu(num_rows: int, dtype: DTypeLike) -> bool:
    few = num_rows <= FEW_ROWS and dtype == jnp.bfloat16
    return few and target()[0] == "cpu" and _cpu_multiplies_bfloat16()


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def einsum(
    equation: str,
    x: Float[Array, "..."],
    w: Num[Array, "..."] | Quantized | OutputsFirst,
    out_sharding: P | None = None,
    out_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "..."]:
    """`einsum(equation, x, w)` of an activation and a parameter.

    The parameter is rounded to x's dtype, sums are kept in f32, and the gradient of
    the parameter stays in the parameter's dtype. A quantized one has no gradient; with
    outputs first there is none at all.

    Args:
      equation: with an explicit output; each letter of x is in w or in the output, and
        each letter of w in x or in the output, there at the end and in w's order.
      out_sharding: layout of the result where the mesh makes it ambiguous. With
        `unreduced` axes the sums over devices are left to the caller, who makes them in
        the result's dtype; so are those of the gradient of an x that is `reduced`. Sums
        with integers are made here.
      out_dtype: dtype of the result; None is x's.
      precision: of f32 inputs on accelerators, which otherwise use fewer bits; forward
        and backward.
    """
    joined = None
    if isinstance(w, OutputsFirst):
        equation = _with_outputs_first(equation)
        joined, w = w, _own_part(w)
    if isinstance(w, Quantized):
        return _quantized_einsum(equation, x, w, out_sharding, out_dtype, precision)
    on_one_device, num_rows = _is_on_one_device(w), _num_rows(equation, x)
    one_row = on_one_device and num_rows == 1
    few = on_one_device and _are_few_on_cpu(num_rows, x.dtype)
    platform, rows = target()[0], _row_axes(equation)
    if one_row and platform == "gpu":
        y = _one_row(equation, x, w.astype(x.dtype), out_sharding)
    elif few and equation == _with_outputs_first(equation):
        y = _few_rows(equation, x, w.astype(x.dtype), out_sharding, joined)
    else:
        whole = _gathered(equation, x, w)
        as_two = one_row and platform == "cpu" and x.dtype == jnp.bfloat16 and rows
        x = _as_two_rows(equation, x) if as_two else x
        product = _product_in_shard_map if _in_shard_map(x) else _product
        y = product(equation, x, whole, out_sharding=out_sharding, precision=precision)
        y = _first_row(equation, y) if as_two else y
    return y.astype(x.dtype if out_dtype is None else out_dtype)


def _quantized_einsum(equation, x, w, out_sharding, out_dtype, precision):
    out_dtype = x.dtype if out_dtype is None else out_dtype
    inputs, out = equation.split("->")
    summed = [i for i, c in enumerate(inputs.partition(",")[2]) if c not in out]
    if out_sharding is not None:
        out_sharding = P(*out_sharding.partitions)
    if any(w.scale.shape[axis] > 1 for axis in summed):
        # For a product of matrices XLA would write the whole weight first.
        if _is_on_one_device(w.values) and _num_rows(equation, x) == 1:
            w = dequantize_weight(w, jnp.float32)
            return _one_row(equation, x, w, out_sharding).astype(out_dtype)
        w = dequantize_weight(w, x.dtype)
        return einsum(equation, x, w, out_sharding, out_dtype, precision)
    # Small integers are exact in each dtype, so that compilers convert them while they
    # are read, and nothing rounds them.
    y = einsum(equation, x, w.values, out_sharding, jnp.float32, precision)
    scale, placed = w.scale.squeeze(summed), layout(y)
    if placed is not None:
        scale = jax.sharding.reshard(
            scale, P(*placed.spec.partitions[y.ndim - scale.ndim :])
        )
    return (y * scale).astype(out_dtype)


def _is_on_one_device(x: Array) -> bool:
    placed = layout(x)
    return placed is None or placed.mesh.size == 1


def _product(equation: str, x: Array, w: Array, **options: Any) -> Array:
    """The product, with f32 sums, over axes in the order in which they lie.

    `jnp.einsum` sums over them in the order of their letters. Where that is another,
    XLA:CPU writes both operands anew.
    """
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    summed = [axis for axis in x_axes if axis in w_axes and axis not in out]
    if len(summed) > 1:
        in_order = str.maketrans(dict(zip(summed, ascii_lowercase, strict=False)))
        equation = equation.translate(in_order)
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32, **options)


def _in_shard_map(x: Array) -> bool:
    return bool(jax.typeof(x).sharding.mesh.manual_axes)


def _product_in_shard_map(equation, x, w, *, out_sharding, precision) -> Array:
    """The product, where XLA takes no `unreduced` arrays.

    Devices that sum over parts of an axis add up their results in x's dtype.
    """
    axes = _summed_axes(equation, x)
    if not axes:
        return _product(equation, x, w, out_sharding=out_sharding, precision=precision)

    def local(x, w):
        y = _product(equation, x, w, precision=precision)
        return jax.lax.psum(y.astype(x.dtype), axes)

    specs = tuple(jax.typeof(array).sharding.spec for array in (x, w))
    out = getattr(out_sharding, "spec", out_sharding)
    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(x, w)


def _summed_axes(equation: str, x: Array) -> tuple[str, ...]:
    """Returns the mesh axes, of several devices, that cut what is summed over."""
    x_axes, out = equation.partition(",")[0], equation.partition("->")[2]
    sharding = jax.typeof(x).sharding
    return tuple(
        axis
        for letter, entry in zip(x_axes, sharding.spec.partitions, strict=True)
        for axis in axes_of(entry)
        if letter not in out and sharding.mesh.shape[axis] > 1
    )


def _row_axes(equation: str) -> str:
    """Returns the axes of x that w has not."""
    x_axes, w_axes = equation.partition("->")[0].split(",")
    return "".join(axis for axis in x_axes if axis not in w_axes)


def _num_rows(equation: str, x: Array) -> int:
    return math.prod(x.shape[equation.index(axis)] for axis in _row_axes(equation))


def _as_two_rows(equation: str, x: Array) -> Array:
    """Repeats one row, for which alone XLA:CPU would write the matrix in f32."""
    return jnp.concatenate([x, x], equation.index(_row_axes(equation)[0]))


def _first_row(equation: str, y: Array) -> Array:
    axis = equation.partition("->")[2].index(_row_axes(equation)[0])
    return jax.lax.slice_in_dim(y, 0, 1, axis=axis)


def _with_outputs_first(equation: str) -> str:
    """Returns the equation for w as [outputs, inputs]."""
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    ordered = "".join(sorted(w_axes, key=lambda axis: axis not in out))
    return f"{x_axes},{ordered}->{out}"


def _own_part(w: OutputsFirst) -> Array | Quantized:
    """Returns the matrix itself, [outputs, inputs], without those in the same array."""
    outputs = w.shape[len(w.shape) - w.num_outputs :]

    def part(x: Array) -> Array:
        if len(x) > math.prod(outputs):
            x = jax.lax.slice_in_dim(x, w.first, w.first + math.prod(outputs))
        shape = (*outputs, *x.shape[1:])
        return reshape(x, shape, (None,) * len(shape))

    return jax.tree.map(part, w.values)


def _few_rows(
    equation: str,
    x: Array,
    w: Array,
    out_sharding: P | None,
    joined: OutputsFirst | None,
) -> Array:
    """Multiplies few rows and w, [outputs, inputs], on a CPU with bfloat16 units.

    Where w lies in one array with others that multiply x, all are multiplied: XLA makes
    one product of those that are the same.

    XLA:CPU packs the right operand anew in each call, which takes longer than the
    product. The tiles of AMX take as many rows of the left one, so there w is that.
    bfloat16, with f32 sums.
    """
    inputs, _, out = equation.partition("->")
    x_axes, w_axes = inputs.split(",")
    if layout(x) is not None:  # one device, of which shapes need no layout
        x = jax.sharding.reshard(x, P())
    sizes = dict(zip(x_axes + w_axes, x.shape + w.shape, strict=True))
    rows = _row_axes(equation)
    summed = "".join(axis for axis in w_axes if axis not in out)
    outputs = w_axes.removesuffix(summed)
    num_rows, num_inputs = (
        math.prod(sizes[a] for a in axes) for axes in (rows, summed)
    )
    num_outputs = math.prod(sizes[axis] for axis in outputs)
    first = 0
    if joined is not None:
        first, w = joined.first, joined.values.astype(x.dtype)
    if layout(w) is not None:
        w = jax.sharding.reshard(w, P())
    # Two axes are summed as one: XLA would copy w for them.
    w = w.reshape(-1, num_inputs)
    x = jnp.einsum(f"{x_axes}->{rows}{summed}", x).reshape(num_rows, num_inputs)
    x = jnp.concatenate([x, x]) if num_rows == 1 else x
    if "amx_bf16" in _cpu_flags():
        # Without the barrier XLA turns the product around to spare the transposition.
        y = jax.lax.optimization_barrier(_product("oi,ri->or", w, x)).T
    else:
        y = _product("ri,oi->ro", x, w)
    y = y[:num_rows, first : first + num_outputs]
    y = y.reshape([sizes[axis] for axis in rows + outputs])
    y = jnp.einsum(f"{rows}{outputs}->{out}", y)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _one_row(equation: str, x: Array, w: Array, out_sharding: P | None) -> Array:
    """Multiplies and sums outside of the matrix units, which one row leaves empty.

    XLA for GPUs then reads w as fast as memory gives it, best where the axes that are
    summed come last, and fuses what surrounds the product. f32.
    """
    inputs, _, out = equation.partition("->")
    x_axes, w_axes = inputs.split(",")
    if layout(w) is not None:  # one device, of which shapes need no layout
        x, w = (jax.sharding.reshard(a, P()) for a in (x, w))
    size = dict(zip(w_axes, w.shape, strict=True))
    shared = [axis for axis in w_axes if axis in x_axes]
    x = jnp.einsum(f"{x_axes}->{''.join(shared)}", x)
    x = x.reshape([size[axis] if axis in shared else 1 for axis in w_axes])
    products = x.astype(jnp.float32) * w.astype(jnp.float32)
    y = jnp.sum(products, [i for i, axis in enumerate(w_axes) if axis not in out])
    y = y.reshape([size.get(axis, 1) for axis in out])
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _gathered(equation: str, x: Array, w: Array) -> Array:
    """Returns w in x's dtype, whole along the mesh axes that x needs otherwise."""
    axes = gathered_axes(equation, x, w)
    if not axes:
        return w.astype(x.dtype)
    sharding = layout(w)
    assert sharding is not None
    if jnp.issubdtype(w.dtype, jnp.floating):
        w = w.astype(x.dtype)
    return all_gather(w, sharding.spec, axes).astype(x.dtype)


def _einsum_forward(equation, x, w, out_sharding, out_dtype, precision):
    if isinstance(w, Quantized):
        options = (out_sharding, out_dtype, precision)
        return jax.vjp(lambda x: _quantized_einsum(equation, x, w, *options), x)
    # Gathered once in a pass, here, and used twice in the backward pass of a layer
    # that is computed again.
    whole = _gathered(equation, x, w)
    y = einsum(equation, x, whole, out_sharding, out_dtype, precision)
    return y, (x, w, whole if gathered_axes(equation, x, w) else None)


def _einsum_backward(equation, out_sharding, out_dtype, precision, residuals, g):
    if not isinstance(residuals, tuple):  # of a quantized weight
        return *residuals(g), None
    x, w, whole = residuals
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    # Cotangents are rounded to the compute dtype so that both products of the
    # backward pass run in it; their sums are f32 again.
    g = g.astype(x.dtype)
    whole_w = w.astype(x.dtype) if whole is None else whole
    dx_equation = f"{out},{w_axes}->{x_axes}"
    product = _product_in_shard_map if _in_shard_map(g) else _product
    dx = product(
        dx_equation, g, whole_w, out_sharding=cotangent_layout(x), precision=precision
    )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return dx.astype(x.dtype), None
    gradient = partial(_product, f"{x_axes},{out}->{w_axes}", precision=precision)
    with jax.named_scope("weight_gradient"):
        if whole is None or compiler_scatters(gathered_axes(equation, x, w)):
            dw = gradient(x, g, out_sharding=layout(w))
        else:
            dw = sum_over_tokens(gradient, (x, g), like=w)
    return dx.astype(x.dtype), dw.astype(w.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)
