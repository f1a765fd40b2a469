"""Finds steps whose loss or gradient is a spike, so that they are not applied.

A step is a spike if its loss or the norm of its gradient is not finite, or lies more
than 6 standard deviations above the mean of the last 128 steps that were applied. This
is the rule of OLMo 2 (arXiv:2501.00656) with two changes: only steps that were applied
enter the mean, so that several spikes in a row cannot raise the bar for the next one;
and NaN never enters it, which would hide every later spike.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int

WINDOW = 128
LEAST = 64
"""Steps that must have been applied before one can be a spike by its size."""
DEVIATIONS = 6.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpikeHistory:
    """What a step is compared with. It is part of the training state."""

    # `Any`: leaves are arrays, or shapes.
    losses: Any
    """f32 [WINDOW]: losses of the last steps that were applied; a ring."""
    grad_norms: Any
    """f32 [WINDOW]: their gradient norms."""
    applied: Any
    """int32 scalar: steps in the ring so far, also those that it has overwritten."""
    skipped: Any
    """int32 scalar: steps skipped so far."""
    in_a_row: Any
    """int32 scalar: how many of them are the last steps; 0 if the last was applied."""


def new_history(sharding: Sharding | None = None) -> SpikeHistory:
    """Returns a history without steps; `sharding` is that of the state's `step`."""
    # Each leaf has memory of its own, as the step donates them all.
    rings = (jnp.zeros(WINDOW, jnp.float32, device=sharding) for _ in range(2))
    counts = (jnp.zeros((), jnp.int32, device=sharding) for _ in range(3))
    return SpikeHistory(*rings, *counts)


def after_step(
    history: SpikeHistory, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> SpikeHistory:
    """Returns the history after a step; its `in_a_row` is above 0 if it is a spike."""
    count = jnp.minimum(history.applied, WINDOW)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    high = _is_high(history.losses, count, loss)
    high |= _is_high(history.grad_norms, count, grad_norm)
    is_spike = ~finite | high

    def push(ring: Float[Array, "n"], value: Float[Array, ""]) -> Float[Array, "n"]:
        new = ring.at[history.applied % WINDOW].set(value)
        return jax.lax.select(is_spike, ring, new)

    return SpikeHistory(
        push(history.losses, loss),
        push(history.grad_norms, grad_norm),
        history.applied + ~is_spike,
        history.skipped + is_spike,
        jnp.where(is_spike, history.in_a_row + 1, 0),
    )


def _is_high(
    ring: Float[Array, "n"], count: Int[Array, ""], value: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether `value` lies far above the first `count` values of `ring`."""
    taken = jnp.arange(WINDOW) < count
    mean = jnp.sum(ring, where=taken) / jnp.maximum(count, 1)
    squares = jnp.sum((ring - mean) ** 2, where=taken)
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return (count >= LEAST) & (value > mean + DEVIATIONS * deviation)
