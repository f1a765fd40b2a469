"""Mixture of experts: routing, the experts' feed-forwards, the load-balance loss.

No token is dropped. `reference_mixture` is the definition. `mixture` sorts the tokens
by expert, so that each expert's matrices multiply only its own tokens.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxlm.ops.activations import activate
from jaxlm.ops.collectives import all_gather_parts, axes_of, psum_scatter
from jaxlm.ops.experts.expert_exchange import SCOPE, plan_exchange, send
from jaxlm.ops.experts.grouped_matmul import grouped_matmul
from jaxlm.ops.layout import layout
from jaxlm.ops.linear import einsum
from jaxlm.types import Quantized

# `gate` (if gated) and `up` [E D F], `down` [E F D]; with biases also `gate_bias`,
# `up_bias` [E F] and `down_bias` [E D].
# Arrays; those that multiply may be `Quantized`.
Matrices = Mapping[str, Any]
Cuts = Mapping[str, tuple[Any, tuple[str, ...]]]


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
    mesh_axes: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """E times the sum over experts of (choices per token) x (mean probability).

    Equations 4 to 6 of Switch (Fedus et al. 2021, arXiv:2101.03961), for k choices and
    with means over the tokens of all layers together, as in transformers'
    `load_balancing_loss_func`. It is k if all experts are chosen equally often.

    Args:
      logits: of the router, f32.
      experts: chosen by `route`; they have no gradient.
      token_weights: weight of each token in the means; if all are 0, the loss is 0.
      mesh_axes: those of a `shard_map` along which devices have other tokens; the means
        are over all.
    """
    E = logits.shape[-1]
    weights = jnp.broadcast_to(token_weights, logits.shape[:-1])[..., None]

    def over_tokens(x: Array) -> Array:
        x = jnp.sum(x * weights, axis=tuple(range(logits.ndim - 1)))
        return jax.lax.psum(x, mesh_axes) if mesh_axes else x

    total = over_tokens(jnp.ones_like(weights))
    total = jnp.where(total > 0, total, 1.0)
    chosen = jnp.sum(experts[..., None] == jnp.arange(E), axis=-2)
    choices = over_tokens(chosen) / total
    probability = over_tokens(jax.nn.softmax(logits, axis=-1)) / total
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
    expert_axes: tuple[str, ...] = (),
) -> Float[Array, "B T D"]:
    """`sum over a token's experts of weight * (act(x gate) * (x up)) down`.

    Einsums take x's dtype and accumulate in f32; gradients of the matrices have the
    matrices' dtype. In an Explicit mesh each device sorts its own tokens. D of the
    matrices is gathered, and F is not: sums over it are added up, rounded to x's dtype.
    If E is cut, by axes that cut the batch too, tokens go to the devices of their
    experts and come back; matrices stay where they are.

    Args:
      weights: of each token's experts, f32, from `route`.
      experts: their indices, from `route`.
      matrices: see `Matrices`.
      activation: a name in `activations.ACTIVATIONS`.
      expert_axes: those of a `shard_map` that this is called in, along which devices
        have their own tokens and the matrices of their own experts.
    """
    inner = {name: m for name, m in matrices.items() if name != "down_bias"}
    run, out = partial(_sorted_mixture, activation), layout(x)
    if out is None:
        y = run(x, weights, experts, inner)
    else:
        y = _on_each_device(activation, x, weights, experts, inner, out, expert_axes)
    if "down_bias" in matrices:  # not sharded, so it is added after the sum
        bias = matrices["down_bias"]
        if expert_axes:
            bias = jax.shard_map(
                partial(jax.lax.all_gather, axis_name=expert_axes, tiled=True),
                in_specs=_partition(bias),
                out_specs=_partition(bias),
                check_vma=False,
            )(bias)
        share = _shares(weights, experts, len(bias))
        if out is not None:
            share = jax.sharding.reshard(share, P(*out.spec.partitions[:2], None))
        y += einsum("BTE,ED->BTD", share, bias)
    return y.astype(x.dtype)


def _on_each_device(
    activation: str,
    x: Array,
    weights: Array,
    experts: Array,
    matrices: Matrices,
    out: NamedSharding,
    expert_axes: tuple[str, ...],
) -> Array:
    """Computes `mixture` for the tokens of each device, with its hidden units.

    Those that share tokens gather x, if they have parts of it, and add up the results.
    """
    arguments = (x, weights, experts, matrices)
    specs, shape = jax.tree.map(_partition, arguments), out.mesh.shape
    up = specs[-1]["up"]
    cut_experts, *whole_axes = up.values if isinstance(up, Quantized) else up
    # E is cut in any case; D is needed whole, and F is not.
    gathered, hidden = (
        tuple(axis for axis in axes_of(entry) if shape[axis] > 1)
        for entry in whole_axes
    )
    cuts = {name: (spec, gathered) for name, spec in specs[-1].items() if gathered}
    run = partial(_sorted_mixture, activation, cuts=cuts)
    axes = expert_axes or axes_of(cut_experts)
    devices = math.prod(shape[axis] for axis in axes)
    if devices > 1:
        # What sends fewer bytes.
        way = _exchanged if experts.shape[-1] < devices else _gathered
        run = partial(way, activation, axes, cuts=cuts)

    def local(x: Array, *others: Any) -> Array:
        y = run(all_gather_parts(x, out.spec, hidden), *others)
        return y.astype(x.dtype)[None] if hidden else y

    tokens = specs[1]
    parts = jax.shard_map(
        local,
        in_specs=specs,
        out_specs=P(hidden, *tokens) if hidden else tokens,
        check_vma=False,
    )(*arguments)
    return psum_scatter(parts, out.spec, hidden) if hidden else parts


def _gathered(
    activation: str,
    axes: tuple[str, ...],
    x: Array,
    weights: Array,
    experts: Array,
    matrices: Matrices,
    cuts: Cuts,
) -> Array:
    """Computes the tokens of all devices that share the experts with its own experts.

    Each device gets all tokens, and sends back the sums of its own experts. No token is
    dropped, whatever the load.
    """

    def from_all(x: Array) -> Array:
        return jax.lax.all_gather(x, axes, axis=0, tiled=True)

    with jax.named_scope(SCOPE):
        x, weights, experts = jax.tree.map(from_all, (x, weights, experts))
    experts -= jax.lax.axis_index(axes) * matrices["up"].shape[0]
    y = _sorted_mixture(activation, x, weights, experts, matrices, cuts, only_own=True)
    with jax.named_scope(SCOPE):
        return jax.lax.psum_scatter(y, axes, scatter_dimension=0, tiled=True)


def _exchanged(
    activation: str,
    axes: tuple[str, ...],
    x: Array,
    weights: Array,
    experts: Array,
    matrices: Matrices,
    cuts: Cuts,
) -> Array:
    """Sends each token to the devices of its experts, and gets the results back.

    There is room for all tokens on each device, so none is dropped.
    """
    B, T, D = x.shape
    k, own = experts.shape[-1], matrices["up"].shape[0]
    devices = jax.lax.axis_size(axes)
    order, inverse, counts = _sort(experts.reshape(-1), devices * own)
    rows = _rows(k, x.reshape(B * T, D), order, inverse)
    exchange = plan_exchange(counts, axes)
    # The experts of a token are different ones.
    room = devices * B * T * min(k, own)
    rows = send(rows, exchange.there, room, axes)
    y = _feed_forward(activation, rows, exchange.sizes, matrices, cuts, has_rest=True)
    y = send(y, exchange.back, B * T * k, axes)
    return _weighted_sum(y, order, inverse, weights)


def _sorted_mixture(
    activation: str,
    x: Array,
    weights: Array,
    experts: Array,
    matrices: Matrices,
    cuts: Cuts = MappingProxyType({}),
    only_own: bool = False,
) -> Array:
    """Computes `mixture` for the tokens and hidden units of one device, [B T D] f32.

    Args:
      cuts: of the matrices of which this device has parts, see `grouped_matmul`.
      only_own: leave out experts whose index is not among the matrices.
    """
    B, T, D = x.shape
    k, E = experts.shape[-1], matrices["up"].shape[0]
    chosen = experts.reshape(-1)
    if only_own:
        chosen = jnp.where((chosen >= 0) & (chosen < E), chosen, E)
    order, inverse, sizes = _sort(chosen, E)
    rows = _rows(k, x.reshape(B * T, D), order, inverse)
    y = _feed_forward(activation, rows, sizes, matrices, cuts, has_rest=only_own)
    return _weighted_sum(y, order, inverse, weights)


def _sort(
    chosen: Int[Array, " M"], num_experts: int
) -> tuple[Int[Array, " M"], Int[Array, " M"], Int[Array, " E"]]:
    """Returns an order by expert, its inverse, and how often each expert is chosen."""
    order = jnp.argsort(chosen, stable=True)
    counts = jnp.sum(
        chosen[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32
    )
    return order, jnp.argsort(order), counts


def _feed_forward(
    activation: str,
    rows: Float[Array, "M D"],
    sizes: Int[Array, " E"],
    matrices: Matrices,
    cuts: Cuts,
    has_rest: bool,
) -> Float[Array, "M D"]:
    """Applies each expert to its group of rows, one group after another.

    Args:
      sizes: of the groups.
      has_rest: there are more rows after the groups; their results are 0.
    """
    position, ends = jnp.arange(len(rows))[:, None], jnp.cumsum(sizes)
    taken = (position >= ends - sizes) & (position < ends)

    def own(rows: Array) -> Array:
        """Hides the rows at the end that belong to no group, and their gradients."""
        if not has_rest:
            return rows
        return jnp.where(jnp.any(taken, axis=1, keepdims=True), rows, 0)

    def project(name: str, h: Array) -> Array:
        y = own(grouped_matmul(own(h), matrices[name], sizes, cut=cuts.get(name)))
        bias = matrices.get(f"{name}_bias")
        if bias is None:
            return y
        # An einsum, because the gradient of a lookup would be scattered row by row.
        return y + einsum("ME,EF->MF", taken.astype(y.dtype), bias)

    hidden = _hidden(partial(project, h=rows), "gate" in matrices, activation)
    return project("down", hidden)


def _weighted_sum(
    y: Float[Array, "M D"],
    order: Int[Array, " M"],
    inverse: Int[Array, " M"],
    weights: Float[Array, "B T k"],
) -> Float[Array, "B T D"]:
    """Puts sorted rows back into order, and sums those of each token, in f32."""
    y = _rows(1, y, inverse, order).reshape(*weights.shape, -1)
    return jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=2)


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
