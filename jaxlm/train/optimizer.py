"""Builds the optax transformation of an `OptimizerConfig`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxlm import tree
from jaxlm.config import OptimizerConfig
from jaxlm.model.params import Role, weight_of
from jaxlm.ops.layout import layout
from jaxlm.ops.orthogonalize import COEFFICIENTS, STEPS, orthogonalize
from jaxlm.types import Params


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Makes the schedule of the learning rate, for steps 0 to `steps` - 1.

    After the warm-up: cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), linear,
    wsd (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395) or constant.
    """
    warmup, final = config.warmup_steps, config.final_fraction * peak
    rest = max(steps - warmup, 1)
    begin = config.first_decayed(steps)
    if begin is None:
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    else:
        stable = begin - warmup
        decaying = optax.linear_schedule(peak, final, rest - stable)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), decaying], [stable]
        )
    if not warmup:
        return after
    # The first step has the rate peak / warmup, not 0, so it learns too.
    rising = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer, after clipping, with weight decay on matrices only.

    Sources: AdamW arXiv:1711.05101, Lion arXiv:2302.06675, Adafactor
    arXiv:1804.04235, Muon https://kellerjordan.github.io/posts/muon.
    """
    rate = make_schedule(config, steps, config.learning_rate)
    decay = config.weight_decay
    b1, b2 = config.b1, config.b2
    if config.name == "adamw":
        rule = optax.adamw(
            rate, b1, b2, config.epsilon, weight_decay=decay, mask=decay_mask
        )
    elif config.name == "lion":
        rule = optax.lion(rate, b1, b2, weight_decay=decay, mask=decay_mask)
    elif config.name == "adafactor":
        # optax's own option does not multiply the decay by the learning rate. Its
        # updates already point downhill, so the decay is negative too.
        rule = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-decay, decay_mask),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        )
    else:
        peak = config.adam_learning_rate or config.learning_rate
        rule = optax.partition(
            {
                "muon": optax.chain(
                    _scale_by_muon(config.momentum, config.epsilon),
                    optax.stateless(_scale_by_shape),
                    optax.add_decayed_weights(decay),
                    optax.scale_by_learning_rate(rate),
                ),
                "adam": optax.nadamw(
                    *(make_schedule(config, steps, peak), b1, b2, config.epsilon),
                    weight_decay=0.0,
                ),
            },
            _muon_or_adam,
        )
    if config.name == "adafactor":
        rule = compiler_sharded(rule)
    if config.clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def decay_mask(params: Params) -> Any:
    """Returns a tree of bools: True for the leaves that get weight decay."""
    return tree.map_with_name(
        lambda path, x: weight_of(path, x).role.multiplies, params
    )


def _muon_or_adam(params: Params) -> Any:
    """Returns `muon` for the matrices in the layers, and `adam` for other leaves."""

    def label(path: str, leaf: Any) -> str:
        role = weight_of(path, leaf).role
        return "muon" if role in (Role.MATRIX, Role.ROUTER) else "adam"

    return tree.map_with_name(label, params)


def _scale_by_muon(decay: float, epsilon: float) -> optax.GradientTransformation:
    """As optax's, which would gather every matrix in each of its steps."""
    init = optax.contrib.scale_by_muon(COEFFICIENTS, STEPS, decay, epsilon).init

    def update(updates, state, params=None):
        correct = optax.tree.bias_correction
        momentum = optax.tree.update_moment(updates, state.mu, decay, 1)
        count = optax.safe_increment(state.count)
        # With Nesterov's look ahead.
        means = jax.tree.map(
            lambda m, g: decay * m + (1 - decay) * g,
            correct(momentum, decay, optax.safe_increment(count)),
            correct(updates, decay, count),
        )
        updates = tree.map_with_name(
            lambda path, x: orthogonalize(x, *weight_of(path, x).matrix_axes, epsilon),
            means,
        )
        return updates, optax.contrib.MuonState(count, momentum, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _scale_by_shape(updates: Any, params: Any = None) -> Any:
    """Multiplies matrices with more columns than rows by the root of their ratio."""

    def scaled(path: str, x: Array) -> Array:
        rows, columns = (
            math.prod(x.shape[axis] for axis in axes)
            for axes in weight_of(path, x).matrix_axes
        )
        return jnp.sqrt(jnp.maximum(1, columns / rows)) * x

    return tree.map_with_name(scaled, updates)


def compiler_sharded(
    rule: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Lets the compiler choose the shardings inside `rule`.

    Results are sharded as the inputs are. For rules whose matmuls and reshapes are
    ambiguous under Explicit axes.
    """

    def update(updates, state, params=None):
        if layout(jax.tree.leaves(updates)[0]) is None:
            return rule.update(updates, state, params)
        results = (updates, state)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, results)
        inner = jax.sharding.auto_axes(out_sharding=shardings)(rule.update)
        return inner(updates, state, params)

    return optax.GradientTransformation(rule.init, update)
