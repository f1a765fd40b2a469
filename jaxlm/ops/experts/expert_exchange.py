"""Rows that go to the devices of their experts and come back, in a `shard_map`.

A slice of rows goes from each device to each expert. Senders have them in the order of
experts; receivers in the order of experts, then of senders.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.ops.attention.request import target

# In the names of the operations, for `plan/traffic.py`.
SCOPE = "expert_parallel"


class Slices(NamedTuple):
    """Slices of rows, as arguments of `jax.lax.ragged_all_to_all`: int32 [slices]."""

    input_offsets: Int[Array, " S"]
    send_sizes: Int[Array, " S"]
    output_offsets: Int[Array, " S"]
    recv_sizes: Int[Array, " S"]


class Exchange(NamedTuple):
    """Which rows go where."""

    there: Slices
    back: Slices
    sizes: Int[Array, " E"]
    """The number of rows that each expert of this device gets."""


def plan_exchange(counts: Int[Array, " N"], axes: tuple[str, ...]) -> Exchange:
    """Plans an exchange over mesh axes.

    Args:
      counts: the number of rows of this device for each expert, on all devices.
    """
    devices, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    own = len(counts) // devices
    with jax.named_scope(SCOPE):
        sent = jax.lax.all_gather(counts, axes)
    leaves = jnp.cumsum(sent, axis=1) - sent
    sizes = jnp.sum(sent, axis=0).reshape(devices, own)
    starts = (jnp.cumsum(sizes, axis=1) - sizes).reshape(-1)
    arrives = starts + jnp.cumsum(sent, axis=0) - sent

    def to_here(x: Array) -> Array:
        """Keeps the slices whose experts are on this device."""
        return jax.lax.dynamic_slice_in_dim(x, here * own, own, axis=1).reshape(-1)

    there = Slices(leaves[here], counts, arrives[here], to_here(sent))
    back = Slices(to_here(arrives), to_here(sent), to_here(leaves), counts)
    return Exchange(there, back, sizes[here])


def send(
    rows: Float[Array, "M D"], slices: Slices, room: int, axes: tuple[str, ...]
) -> Float[Array, "R D"]:
    """Sends slices of rows, and returns those received among `room` rows, else zeros.

    Only these rows move, except on CPUs, which have no such instruction: there each
    device gets all rows.
    """
    with jax.named_scope(SCOPE):
        if target()[0] == "cpu":
            return _taken_from_all(rows, slices, room, axes)
        empty = jnp.zeros((room, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, empty, *slices, axis_name=axes)


def _taken_from_all(rows, slices: Slices, room: int, axes) -> Array:
    """`jax.lax.ragged_all_to_all` onto zeros, by its definition."""
    devices = jax.lax.axis_size(axes)
    starts, begins = (
        jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
        for x in (slices.input_offsets, slices.output_offsets)
    )
    position = jnp.arange(room)[:, None]
    inside = (position >= begins) & (position < begins + slices.recv_sizes)
    which = jnp.argmax(inside, axis=1)
    sender = which // (len(begins) // devices)
    index = sender * len(rows) + starts[which] + position[:, 0] - begins[which]
    taken = jnp.any(inside, axis=1)
    every = jax.lax.all_gather(rows, axes, tiled=True)
    return jnp.where(taken[:, None], every[jnp.where(taken, index, 0)], 0)
