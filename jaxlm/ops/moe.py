"""Mixture of experts: routing, the experts' feed-forwards, the load-balance loss.

No token is dropped. `reference_mixture` is the definition. `mixture` sorts the tokens
by expert, so that each expert's matrices multiply only its own tokens.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxlm.ops.collectives import axes_of
from jaxlm.ops.feed_forward import activate
from jaxlm.ops.layout import layout
from jaxlm.ops.linear import einsum

# `gate` (if gated) and `up` [E D F], `down` [E F D]; with biases also `gate_bias`,
# `up_bias` [E F] and `down_bias` [E D].
Matrices = Mapping[str, Array]


def route(
    logits: Float[Array, "*B E"], k: int, normalize: bool
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """Chooses the `k` experts with the greatest logits for each token.

    Args:
      logits: f32.
      normalize: True makes the weights sum to 1 (Mixtral, arXiv:2401.04088, section
        2.1; gpt-oss), as a softmax over all experts divided by the sum over the chosen
        ones would. False takes the softmax over all (Switch, arXiv:2101.03961).

    Returns:
      Weights (f32) and indices of the experts, greatest first; for equal logits the
      lower index first.
    """
    best, experts = jax.lax.top_k(logits, k)
    if normalize:
        return jax.nn.softmax(best, axis=-1), experts
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.exp(best - total), experts


def load_balance_loss(
    logits: Float[Array, "*L B T E"],
    experts: Int[Array, "*L B T k"],
    token_weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """E times the sum over experts of (choices per token) x (mean probability).

    Equations 4 to 6 of Switch (Fedus et al. 2021, arXiv:2101.03961), for k choices and
    with means over the tokens of all layers together, as in transformers'
    `load_balancing_loss_func`. It is k if all experts are chosen equally often.

    Args:
      logits: of the router, f32.
      experts: chosen by `route`; they have no gradient.
      token_weights: weight of each token in the means; if all are 0, the loss is 0.
    """
    E = logits.shape[-1]
    axes = tuple(range(logits.ndim - 1))
    weights = jnp.broadcast_to(token_weights, logits.shape[:-1])[..., None]
    total = jnp.sum(weights)
    total = jnp.where(total > 0, total, 1.0)
    chosen = jnp.sum(experts[..., None] == jnp.arange(E), axis=-2)
    choices = jnp.sum(chosen * weights, axes) / total
    probability = jnp.sum(jax.nn.softmax(logits, axis=-1) * weights, axes) / total
    return E * jnp.sum(choices * probability)


def reference_mixture(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    matrices: Matrices,
    activation: str,
) -> Float[Array, "B T D"]:
    """Applies every expert to every token, and sums the chosen ones by weight."""

    def project(name: str, equation: str, h: Array) -> Array:
        y = einsum(equation, h, matrices[name])
        bias = matrices.get(f"{name}_bias")
        return y if bias is None else y + bias.astype(y.dtype)

    def project_in(name: str) -> Array:
        return project(name, "BTD,EDF->BTEF", x)

    hidden = _hidden(project_in, "gate" in matrices, activation)
    y = project("down", "BTEF,EFD->BTED", hidden)
    share = _shares(weights, experts, matrices["up"].shape[0])
    return jnp.sum(share[..., None] * y, axis=2).astype(x.dtype)


def _hidden(project: Callable[[str], Array], gated: bool, activation: str) -> Array:
    """Computes the hidden units; `project` applies a projection by name."""
    pre, up = project("up"), None
    if gated:
        pre, up = project("gate"), pre
    return activate(pre, up, activation)


def _shares(weights: Array, experts: Array, num_experts: int) -> Array:
    """Scatters the weights to all experts, [B T E] f32: 0 if not chosen."""
    chosen = experts[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen, weights[..., None], 0.0), axis=-2)


def _partition(x: Array) -> P:
    """Returns the partition of x in an Explicit mesh."""
    sharding = layout(x)
    assert sharding is not None
    return sharding.spec


def mixture(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    matrices: Matrices,
    activation: str,
) -> Float[Array, "B T D"]:
    """`sum over a token's experts of weight * (act(x gate) * (x up)) down`.

    Einsums take x's dtype and accumulate in f32; gradients of the matrices have the
    matrices' dtype. In an Explicit mesh each device sorts its own tokens: all but D may
    be sharded. If E is, by axes that cut the batch too, tokens go to the devices of
    their experts and come back; matrices stay where they are.

    Args:
      weights: of each token's experts, f32, from `route`.
      experts: their indices, from `route`.
      matrices: see `Matrices`.
      activation: a name in `feed_forward.ACTIVATIONS`.
    """
    inner = {name: m for name, m in matrices.items() if name != "down_bias"}
    run, out = partial(_sorted_mixture, activation), layout(x)
    if out is not None:
        arguments = (x, weights, experts, inner)
        specs = jax.tree.map(_partition, arguments)
        expert_axes, *_, hidden_axes = specs[-1]["up"]
        if math.prod(out.mesh.shape[axis] for axis in axes_of(expert_axes)) > 1:
            run = partial(_exchanged, run, axes_of(expert_axes))
        run = jax.shard_map(
            partial(run, sum_over=hidden_axes),
            in_specs=specs,
            out_specs=out.spec,
            check_vma=False,
        )
    y = run(x, weights, experts, inner)
    if "down_bias" in matrices:  # not sharded, so it is added after the sum
        share = _shares(weights, experts, matrices["down_bias"].shape[0])
        y += einsum("BTE,ED->BTD", share, matrices["down_bias"])
    return y.astype(x.dtype)


def _exchanged(
    run: Callable[..., Array],
    axes: tuple[str, ...],
    x: Array,
    weights: Array,
    experts: Array,
    matrices: Matrices,
    sum_over: Any,
) -> Array:
    """Calls `_sorted_mixture` with the tokens of all devices that share the experts.

    Each device gets all tokens, and sends back the sums of its own experts. No token is
    dropped, whatever the load.
    """

    def from_all(x: Array) -> Array:
        return jax.lax.all_gather(x, axes, axis=0, tiled=True)

    with jax.named_scope("expert_parallel"):
        x, weights, experts = jax.tree.map(from_all, (x, weights, experts))
    experts -= jax.lax.axis_index(axes) * matrices["up"].shape[0]
    y = run(x, weights, experts, matrices, sum_over=sum_over, only_own=True)
    with jax.named_scope("expert_parallel"):
        return jax.lax.psum_scatter(y, axes, scatter_dimension=0, tiled=True)


def _sorted_mixture(
    activation: str,
    x: Array,
    weights: Array,
    experts: Array,
    matrices: Matrices,
    sum_over: Any = None,
    only_own: bool = False,
) -> Array:
    """Computes `mixture` for the tokens and hidden units of one device, [B T D] f32.

    Args:
      sum_over: mesh axes over which hidden units are sharded.
      only_own: leave out experts whose index is not among the matrices.
    """
    B, T, D = x.shape
    k, E = experts.shape[-1], matrices["up"].shape[0]
    chosen = experts.reshape(-1)
    if only_own:
        chosen = jnp.where((chosen >= 0) & (chosen < E), chosen, E)
    order = jnp.argsort(chosen, stable=True)
    inverse = jnp.argsort(order)
    taken = chosen[order][:, None] == jnp.arange(E)
    sizes = jnp.sum(taken, axis=0, dtype=jnp.int32)

    def own(rows: Array) -> Array:
        """Hides the rows at the end that belong to no group, and their gradients."""
        if not only_own:
            return rows
        return jnp.where(jnp.any(taken, axis=1, keepdims=True), rows, 0)

    def project(name: str, h: Array) -> Array:
        y = own(grouped_matmul(own(h), matrices[name], sizes))
        bias = matrices.get(f"{name}_bias")
        if bias is None:
            return y
        # An einsum, because the gradient of a lookup would be scattered row by row.
        return y + einsum("ME,EF->MF", taken.astype(y.dtype), bias)

    rows = _rows(k, x.reshape(B * T, D), order, inverse)
    hidden = _hidden(partial(project, h=rows), "gate" in matrices, activation)
    y = project("down", hidden)
    y = _rows(1, y, inverse, order).reshape(B, T, k, D)
    y = jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=2)
    return y if sum_over is None else jax.lax.psum(y, sum_over)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(copies: int, x: Array, order: Array, inverse: Array) -> Array:
    """`repeat(x, copies)[order]` for a permutation `order` and its inverse.

    A gather of rows in both directions; JAX's own gradient is a scatter.
    """
    return x[order // copies]


def _rows_forward(copies, x, order, inverse):
    return _rows(copies, x, order, inverse), inverse


def _rows_backward(copies, inverse, g):
    g = g[inverse].reshape(-1, copies, *g.shape[1:])
    return jnp.sum(g, axis=1), None, None


_rows.defvjp(_rows_forward, _rows_backward)


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "M F"]:
    """Multiplies E consecutive groups of rows of x, each by a matrix of its own.

    The matrices are cast to x's dtype, sums are f32, and the gradient of the matrices
    has their dtype.

    Args:
      sizes: number of rows in each group. Rows after the last group have results
        without meaning.
      implementation: `ragged_dot` leaves it to XLA, which has an instruction for it on
        accelerators, but on the CPU multiplies each row by all E matrices; `blocks`
        loops over blocks of rows of one group; `auto` takes `blocks` on the CPU.
    """
    if implementation == "auto":
        implementation = "blocks" if jax.default_backend() == "cpu" else "ragged_dot"
    return _grouped(implementation, x, w, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation, x, w, sizes):
    rows, _ = IMPLEMENTATIONS[implementation]
    return rows(x, w, sizes, 1)


def _grouped_forward(implementation, x, w, sizes):
    return _grouped(implementation, x, w, sizes), (x, w, sizes)


def _grouped_backward(implementation, residuals, g):
    x, w, sizes = residuals
    rows, matrices = IMPLEMENTATIONS[implementation]
    g = g.astype(x.dtype)
    return rows(g, w, sizes, 2), matrices(x, g, sizes).astype(w.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _ragged(x, w, sizes, contracted, ragged, group) -> Array:
    """Calls `ragged_dot_general` with f32 sums, contracting one axis of each array."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contracted[0],), (contracted[1],)), ((), ())),
        lhs_ragged_dimensions=[ragged],
        rhs_group_dimensions=group,
    )
    return jax.lax.ragged_dot_general(
        x, w, sizes, numbers, preferred_element_type=jnp.float32
    )


def _ragged_rows(x, w, sizes, axis):
    y = _ragged(x, w.astype(x.dtype), sizes, (1, axis), 0, [0])
    return y.astype(x.dtype)


def _ragged_matrices(x, g, sizes):
    return _ragged(x, g, sizes, (0, 0), 0, [])


def _blocks(
    sizes: Int[Array, " E"], num_rows: int
) -> tuple[int, Int[Array, ""], Callable[[Any], tuple[Array, Array, Array]]]:
    """Plans blocks of rows that cover the groups; the last one may overlap the next.

    Returns:
      The number of rows per block; the number of blocks; and a function from the index
      of a block to (group, first row, end of the group). Groups without rows have no
      blocks, so decoding a few tokens reads only the matrices that they need.
    """
    # Half the rows of an average group: larger blocks compute more rows of the next
    # group in vain, smaller ones copy each matrix more often. XLA:CPU has no fast
    # bfloat16 matmul for a single row.
    size = 2
    while size < min(num_rows // (2 * len(sizes)), 128):
        size *= 2
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // size)
    last = jnp.cumsum(counts)

    def block(i):
        group = jnp.sum(i >= last)
        inside = i - (last[group] - counts[group])
        return group, ends[group] - sizes[group] + inside * size, ends[group]

    return size, last[-1], block


# Jitted, so that outside of a jit the loop is not compiled again for each layer.
@partial(jax.jit, static_argnames="axis")
def _block_rows(x, w, sizes, axis):
    size, count, block = _blocks(sizes, len(x))
    # The last block may reach beyond the last row.
    x = jnp.pad(x, ((0, size), (0, 0)))

    def one(i, y):
        group, first, _ = block(i)
        rows = jax.lax.dynamic_slice_in_dim(x, first, size)
        out = jax.lax.dot_general(
            rows,
            w[group].astype(x.dtype),
            (((1,), (axis - 1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        # Rows of the next group are wrong here; its own blocks overwrite them later.
        return jax.lax.dynamic_update_slice_in_dim(y, out.astype(x.dtype), first, 0)

    columns = w.shape[3 - axis]
    y = jax.lax.fori_loop(0, count, one, jnp.zeros((len(x), columns), x.dtype))
    return y[: len(x) - size]


@jax.jit
def _block_matrices(x, g, sizes):
    size, count, block = _blocks(sizes, len(x))
    x, g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))

    def two(rows: Array) -> Array:
        """Splits the rows: XLA:CPU is fast in bfloat16 with two contracted axes."""
        return rows.reshape(2, size // 2, rows.shape[1])

    def one(i, dw):
        group, first, end = block(i)
        inside = first + jnp.arange(size) < end
        rows = jax.lax.dynamic_slice_in_dim(g, first, size)
        rows = jnp.where(inside[:, None], rows, 0)
        new = jnp.einsum(
            "abd,abf->df",
            two(jax.lax.dynamic_slice_in_dim(x, first, size)),
            two(rows),
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_index_in_dim(dw, dw[group] + new, group, 0)

    shape = (len(sizes), x.shape[1], g.shape[1])
    return jax.lax.fori_loop(0, count, one, jnp.zeros(shape, jnp.float32))


# Each is two functions: rows(x, w, sizes, axis of w to contract), and the gradient of
# the matrices(x, g, sizes).
IMPLEMENTATIONS = {
    "ragged_dot": (_ragged_rows, _ragged_matrices),
    "blocks": (_block_rows, _block_matrices),
}
