"""Gathers and scatters by permutes, from each device to its neighbours in a ring.

Compilers for TPUs other than v5e compute while permutes are under way, but wait for
gathers and scatters. Both functions are linear, each the transpose of the other, and
one operation for a policy of `jax.checkpoint`: `linear_call`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jaxtyping import Array


@dataclass(frozen=True)
class Ring:
    """Rings that the devices along mesh axes form, inside a `shard_map` of these."""

    axes: tuple[str, ...]
    size: int
    """Number of devices of a ring."""
    stride: int
    """From one to the next, in the order of `axes`."""

    def place(self) -> Array:
        """Returns which one in its ring a device is."""
        return jax.lax.axis_index(self.axes) // self.stride % self.size

    def pass_on(self, x: Array, step: int) -> Array:
        """Gives x to the device `step` further, and returns that of the one before."""
        shape = jax.sharding.get_abstract_mesh().shape
        pairs = []
        for device in range(math.prod(shape[axis] for axis in self.axes)):
            place = device // self.stride % self.size
            further = (place + step) % self.size - place
            pairs.append((device, device + further * self.stride))
        return jax.lax.ppermute(x, self.axes, pairs)

    def ways(self) -> tuple[tuple[int, int], ...]:
        """Returns the step of each way around, and how often it is made."""
        return (1, self.size // 2), (-1, (self.size - 1) // 2)


def rings_along(axes: tuple[str, ...], sizes: Sequence[int]) -> list[Ring]:
    """Returns the rings along `axes`, of which each has several devices.

    Args:
      sizes: of the rings; of the first one, devices next to each other are members.
    """
    strides = [math.prod(sizes[:number]) for number in range(len(sizes))]
    rings = zip(sizes, strides, strict=True)
    return [Ring(axes, size, stride) for size, stride in rings if size > 1]


def gather_around(ring: Ring, dimension: int, x: Array) -> Array:
    """Returns the arrays of the devices of a ring, one after another in `dimension`."""
    return _linear(_gather, _scatter, ring, dimension, x)


def scatter_around(ring: Ring, dimension: int, x: Array) -> Array:
    """Adds up the arrays of a ring; each device gets its part of `dimension`."""
    return _linear(_scatter, _gather, ring, dimension, x)


def _linear(
    function: Callable[..., Array],
    transpose: Callable[..., Array],
    ring: Ring,
    dimension: int,
    x: Array,
) -> Array:
    run, back = (partial(f, ring, dimension) for f in (function, transpose))
    return linear_call(lambda _, x: run(x), lambda _, g: back(g), (), x)


def _gather(ring: Ring, dimension: int, x: Array) -> Array:
    place, length = ring.place(), x.shape[dimension]
    # Its own part is in place; the others follow.
    whole = jnp.concatenate([x] * ring.size, dimension)
    for step, times in ring.ways():
        part = x
        for distance in range(1, times + 1):
            part = ring.pass_on(part, step)
            start = (place - distance * step) % ring.size * length
            whole = jax.lax.dynamic_update_slice_in_dim(whole, part, start, dimension)
    return whole


def _scatter(ring: Ring, dimension: int, x: Array) -> Array:
    place, length = ring.place(), x.shape[dimension] // ring.size

    def part(distance: int) -> Array:
        start = (place + distance) % ring.size * length
        return jax.lax.dynamic_slice_in_dim(x, start, length, dimension)

    total = part(0)
    for step, times in ring.ways():
        if not times:
            continue
        # What the farthest device gets starts first; those on the way add their own.
        passed = ring.pass_on(part(times * step), step)
        for distance in range(times - 1, 0, -1):
            passed = ring.pass_on(passed + part(distance * step), step)
        total += passed
    return total
