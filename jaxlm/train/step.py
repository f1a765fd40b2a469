"""The training step and the evaluation step: pure, jitted functions.

Read `make_train_step` first: it takes a gradient (`loss_and_grads`, of the loss that
`loss_sums` adds up) and lets the optimizer update the state. The functions between are
how microbatches and devices share that work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jaxlm import tree
from jaxlm.config import Config, ModelConfig, TrainConfig
from jaxlm.model.params import cast_matrices
from jaxlm.model.transformer import forward, head_params, unembed
from jaxlm.ops.attention.context_parallel import to_zigzag
from jaxlm.ops.collectives import all_gather, axes_of, psum_scatter
from jaxlm.ops.experts.moe import load_balance_loss, route
from jaxlm.ops.layout import reshape
from jaxlm.ops.linear import compute_dtype
from jaxlm.ops.loss import chunked_cross_entropy_sums, cross_entropy_sums
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import activation_spec, context_parts, reshard
from jaxlm.train.optimizer import make_schedule
from jaxlm.train.spikes import after_step
from jaxlm.train.state import TrainState
from jaxlm.types import Batch, Params

EvalStep = Callable[[Params, Batch], tuple[Float[Array, ""], Float[Array, ""]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, as f32 scalars on the device."""

    # `Any`: see `jaxlm/types.py` on leaves.
    loss: Any
    """Mean cross-entropy in nats per token, before the update."""
    grad_norm: Any
    """Global norm of the gradient, before clipping."""
    weight_sum: Any
    """Sum of the loss weights, at least 1."""
    lr: Any
    """Learning rate of the update."""
    skipped_in_a_row: Any = None
    """How many steps in a row, up to this one, were skipped, an int32; None if spikes
    are not skipped."""
    hits: tuple[Any, ...] = ()
    """How often each edit has fired, for `check_hits`."""
    expert_load: Any = None
    """Tokens of the busiest expert of any layer, as a multiple of the mean over the
    experts of its layer; None without experts. None are dropped."""


class LossSums(NamedTuple):
    """Sums over the tokens of a batch."""

    objective: Float[Array, ""]
    """What training minimizes: cross-entropy, z-loss and load-balance loss."""
    entropy: Float[Array, ""]
    """The cross-entropy alone, in nats."""
    hits: tuple[Any, ...]
    """How often each edit has fired."""
    expert_tokens: Float[Array, "L E"] | None = None
    """How many tokens chose each expert, padding among them; None without experts."""


def loss_sums(
    config: ModelConfig,
    train: TrainConfig,
    params: Params,
    batch: Batch,
    edits: Sequence[Edit] = (),
) -> LossSums:
    """Returns sums over the batch.

    Tokens are weighted by their loss weights. The load-balance loss is a mean over the
    batch, so it is multiplied by the sum of the loss weights.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    zigzag = context_parts() > 1 and not edits
    if zigzag:
        batch = jax.tree.map(_to_zigzag, batch)
    balanced = train.load_balance_loss > 0
    routing = Tap("router_logits")
    if not balanced:  # Only which experts were chosen.
        routing = Tap("router_logits", reduce="top_k", count=config.experts_per_token)
    out = forward(
        config,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        taps=(routing,) if config.num_experts else (),
        edits=edits,
        head=False,
        zigzag=zigzag,
    )
    x = out.hidden_states
    targets, weights = batch.targets, batch.loss_weights
    with jax.named_scope("head"):
        if train.loss_chunk:
            objective, entropy = chunked_cross_entropy_sums(
                partial(unembed, config),
                head_params(config, params),
                x,
                targets,
                weights,
                train.loss_chunk,
                train.z_loss,
            )
        else:
            logits = unembed(config, params, x)
            objective, entropy = cross_entropy_sums(
                logits, targets, weights, z_loss=train.z_loss
            )
    if not config.num_experts:
        return LossSums(objective, entropy, out.hits)
    logits = out.trace["router_logits"]
    if balanced:
        _, experts = route(logits, config.experts_per_token, config.router_normalize)
        # In a `shard_map` each device has some of the rows.
        manual_axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        balance = load_balance_loss(logits, experts, weights, manual_axes)
        objective += train.load_balance_loss * balance * jnp.sum(weights)
    else:
        experts = logits.indices
    chosen = experts[..., None] == jnp.arange(config.num_experts)
    tokens = jnp.sum(chosen, axis=(1, 2, 3), dtype=jnp.float32)
    return LossSums(objective, entropy, out.hits, tokens)


def _to_zigzag(x: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Puts an array of a batch into the order that balances the work of attention."""
    return reshard(to_zigzag(reshard(x, "B_"), context_parts()), "BT")


class LossAndGrads(NamedTuple):
    """The mean loss of a batch, its gradient and counts."""

    loss: Float[Array, ""]
    """Mean cross-entropy, in nats per token."""
    grads: Params
    """Of the mean objective."""
    weight_sum: Float[Array, ""]
    """Sum of the loss weights, at least 1: a batch without any is not divided by 0."""
    hits: tuple[Any, ...]
    """As in `LossSums`."""
    expert_tokens: Float[Array, "L E"] | None
    """As in `LossSums`."""


class _Reported(NamedTuple):
    """What is summed over microbatches and devices, beside the gradient."""

    loss: Any
    """The part of the mean cross-entropy that these tokens contribute."""
    hits: Any
    expert_tokens: Any


def loss_and_grads(
    config: ModelConfig,
    train: TrainConfig,
    params: Params,
    batch: Batch,
    edits: Sequence[Edit] = (),
) -> LossAndGrads:
    """Returns the mean loss and its gradient.

    The batch is split into `train.accumulation_steps` microbatches. Sums over tokens
    are divided by the weights of the whole batch, so the split does not change the
    result, except for the load-balance loss, which is computed per microbatch.
    """
    weight_sum = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)

    def mean_objective(params, microbatch, weight_sum):
        sums = loss_sums(config, train, params, microbatch, edits)
        loss = sums.entropy / weight_sum
        reported = _Reported(loss, sums.hits, sums.expert_tokens)
        return sums.objective / weight_sum, reported

    gradient = jax.value_and_grad(mean_objective, has_aux=True)
    count = train.accumulation_steps
    if count == 1:
        (_, reported), grads = gradient(params, batch, weight_sum)
    else:
        expert_tokens = None
        if config.num_experts:
            shape = config.num_layers, config.num_experts
            expert_tokens = jax.ShapeDtypeStruct(shape, jnp.float32)
        shapes = _Reported(
            jax.ShapeDtypeStruct((), jnp.float32),
            (jax.ShapeDtypeStruct((), jnp.int32),) * len(edits),
            expert_tokens,
        )
        accumulate = partial(_accumulate, gradient, count, shapes)
        axes = _added_up_last(config, train, edits)
        if axes:
            dtype = compute_dtype(config.dtype)
            accumulate = partial(_accumulate_on_devices, accumulate, axes, dtype)
        reported, grads = accumulate(params, batch, weight_sum)
    return LossAndGrads(
        reported.loss, grads, weight_sum, reported.hits, reported.expert_tokens
    )


def _added_up_last(
    config: ModelConfig, train: TrainConfig, edits: Sequence[Edit]
) -> tuple[str, ...]:
    """Returns the mesh axes along which gradients are added up after all microbatches.

    Along `data` and `expert` each device has a whole gradient in any case, but for the
    experts of others. Edits may be computed from the rows of all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if activation_spec("B") is None or edits:
        return ()
    named = ("data", "fsdp", "expert") if train.accumulate_whole else ("data", "expert")
    return tuple(axis for axis in named if mesh.shape[axis] > 1)


def _accumulate_on_devices(
    accumulate: Callable[..., tuple[_Reported, Params]],
    axes: tuple[str, ...],
    dtype: DTypeLike,
    params: Params,
    batch: Batch,
    weight_sum: Float[Array, ""],
) -> tuple[_Reported, Params]:
    """Lets each device along `axes` accumulate over its own rows; then adds all up.

    With `fsdp` among them, weights are gathered once, in `dtype`, before the first
    microbatch. Experts stay where they are. Gradients come back as the parameters are
    stored.
    """
    stored = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, params)
    cuts = jax.tree.map(partial(_without_mixed_cuts, axes), stored)
    weights = params
    if "fsdp" in axes:
        weights = jax.sharding.reshard(cast_matrices(params, dtype), cuts)
        weights = tree.map_with_name(_gather, weights, cuts)
    own = jax.tree.map(partial(_own_experts, axes), cuts)
    parts = jax.tree.map(partial(_parts, axes), own)

    def on_one_device(weights, batch, weight_sum):
        # Gradients have the dtype of the weights that are given here: that of `params`,
        # in which they can be summed. The model casts to `dtype` again, and XLA drops
        # both casts.
        weights = jax.tree.map(lambda w, x: w.astype(x.dtype), weights, params)
        reported, grads = accumulate(weights, batch, weight_sum)
        return jax.lax.psum(reported, axes), jax.tree.map(lambda g: g[None], grads)

    run: Any = jax.shard_map(
        on_one_device,
        in_specs=(own, P(axes), P()),
        out_specs=(P(), parts),
        axis_names=set(axes),
        check_vma=False,
    )
    batch = jax.tree.map(partial(_rows_of_devices, axes), batch)
    reported, grads_of_devices = run(weights, batch, weight_sum)
    grads = tree.map_with_name(_add_up, grads_of_devices, cuts, parts)
    return reported, jax.sharding.reshard(grads, stored)


def _without_mixed_cuts(axes: tuple[str, ...], partition: P) -> P:
    """Drops other axes from the dimensions that `axes` cut too.

    What both cut cannot be gathered along `axes` alone.
    """
    kept = [tuple(axis for axis in axes_of(cut) if axis in axes) for cut in partition]
    return P(*(own or cut for own, cut in zip(kept, partition, strict=True)))


def _rows_of_devices(axes: tuple[str, ...], x: Array) -> Array:
    """Cuts an array of a batch along `axes` first, as their `shard_map` must."""
    rows, length = jax.typeof(x).sharding.spec
    others = (axis for axis in axes_of(rows) if axis not in axes)
    return jax.sharding.reshard(x, P((*axes, *others), length))


def _own_experts(axes: tuple[str, ...], cut: P) -> P:
    """Returns how a weight is cut into the experts of devices along `axes`."""
    own = {"expert"} & set(axes)
    return P(*("expert" if own & set(axes_of(entry)) else None for entry in cut))


def _parts(axes: tuple[str, ...], own: P) -> P:
    """Returns how the gradients of a weight, one of each device, are cut.

    They are stacked, but for those of experts, which only their own device has.
    """
    return P(tuple(axis for axis in axes if axis not in own), *own)


def _gather(path: str, weight: Array, cut: P) -> Array:
    """Returns the weight `path`, which is cut as `cut` tells, whole along `fsdp`."""
    with jax.named_scope(_scope(path)):
        return all_gather(weight, cut, ("fsdp",))


def _add_up(path: str, grads: Array, cut: P, parts: P) -> Array:
    """Adds up the gradients of the weight `path`, stacked as `parts` tells."""
    with jax.named_scope(f"{_scope(path)}/weight_gradient"):
        return psum_scatter(grads, cut, axes_of(parts[0]))


def _scope(path: str) -> str:
    """Returns the part of the model that a weight belongs to, as the model names it."""
    scopes = {"layers": "Block", "embed": "embed", "lm_head": "head"}
    return scopes.get(path.partition("/")[0], path)


def _accumulate(
    gradient: Callable[..., Any],
    count: int,
    shapes: _Reported,
    params: Params,
    batch: Batch,
    weight_sum: Float[Array, ""],
) -> tuple[_Reported, Params]:
    """Sums what is reported, and the gradients, of `count` microbatches.

    Args:
      shapes: shapes and dtypes of what is reported.
    """

    def split(x: Array) -> Array:
        """[B, T] -> [count, B / count, T]; each microbatch has rows from all shards."""
        B, T = x.shape
        return reshape(x, (B // count, count, T), (0, None, 1)).swapaxes(0, 1)

    # Scans over plain arrays: those of a `Batch` are [B, T], without a leading axis.
    leaves, structure = jax.tree.flatten(batch)
    microbatches = [split(x) for x in leaves]

    def accumulate(sums, microbatch):
        part = jax.tree.unflatten(structure, microbatch)
        (_, reported), grads = gradient(params, part, weight_sum)
        return jax.tree.map(jnp.add, sums, (reported, grads)), None

    def zeros(x: Any) -> Array:
        return jnp.zeros(x.shape, x.dtype)

    start = jax.tree.map(zeros, shapes), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(accumulate, start, microbatches)[0]


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Returns a jitted step; it donates its input state.

    A third argument gives edits, with which the loss and its gradient are computed.

    If the state has a history of spikes, a step that is a spike changes nothing but
    `step` and that history: parameters and optimizer state, with the counts from which
    the optimizer takes its learning rate, stay as they were, bit for bit.
    """
    model, train = config.model, config.train
    peak = config.optimizer.learning_rate
    schedule = make_schedule(config.optimizer, train.steps, peak)

    def train_step(
        state: TrainState, batch: Batch, edits: Sequence[Edit] = ()
    ) -> tuple[TrainState, StepMetrics]:
        loss, grads, weight_sum, hits, expert_tokens = loss_and_grads(
            model, train, state.params, batch, edits
        )
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        spikes = state.spikes
        updates_done = state.step if spikes is None else state.step - spikes.skipped
        rate = jnp.asarray(schedule(updates_done), jnp.float32)
        norm = tree.global_norm(grads)
        metrics = StepMetrics(loss, norm, weight_sum, rate, hits=hits)
        if expert_tokens is not None:
            load = jnp.max(expert_tokens / jnp.mean(expert_tokens, 1, keepdims=True))
            metrics = dataclasses.replace(metrics, expert_load=load)
        if spikes is not None:
            spikes = after_step(spikes, loss, metrics.grad_norm)
            old, new = (state.params, state.opt_state), (params, opt_state)
            choose = partial(jax.lax.select, spikes.in_a_row > 0)
            params, opt_state = jax.tree.map(choose, old, new)
            metrics = dataclasses.replace(metrics, skipped_in_a_row=spikes.in_a_row)
        return TrainState(state.step + 1, params, opt_state, spikes), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: ModelConfig, train: TrainConfig) -> EvalStep:
    """Returns a jitted function: sums of the cross-entropy (nats) and loss weights."""

    def eval_step(params: Params, batch: Batch):
        entropy = loss_sums(config, train, params, batch).entropy
        return entropy, jnp.sum(batch.loss_weights)

    return jax.jit(eval_step)
