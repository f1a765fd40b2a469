"""The order of devices in which the steps of rings are short, on the links of a torus.

A mesh axis whose devices fill a box of the torus is cut into rings (`ring_sizes`). A
ring gets a part of a dimension, or parts of several, which it goes through in a Gray
code, so that each step goes along one of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class _Part:
    """Places of a dimension, `size` of them, each `stride` places after the last."""

    dimension: int
    size: int
    stride: int
    links: int
    """Between places next to each other in the dimension."""
    closes: int
    """Number of places in a row after which links lead back to the first; 0: none."""

    @property
    def is_open(self) -> bool:
        return self.size > 2 and self.size * self.stride != self.closes

    def cut(self, size: int, *, fine: bool) -> tuple["_Part", "_Part"]:
        """Returns `size` of the places, next to each other or far apart; the rest."""
        inner = size if fine else self.size // size
        near = replace(self, size=inner)
        far = replace(self, size=self.size // inner, stride=self.stride * inner)
        return (near, far) if fine else (far, near)


def ring_links(
    places: np.ndarray, sizes: Sequence[int], period: np.ndarray
) -> list[int]:
    """Returns how many links a step of each ring takes, at most.

    Args:
      places: coordinates of chips, [devices along the mesh axis, ..., dimension].
      sizes: of the rings, as `ring_sizes` gives them.
      period: chips after which links lead back, in each dimension; 0: they do not.
    """
    split = places.reshape(*reversed(sizes), *places.shape[1:])
    found = []
    for axis in reversed(range(len(sizes))):
        steps = np.abs(split - np.roll(split, -1, axis=axis))
        steps = np.where(period > 0, np.minimum(steps, period - steps), steps)
        found.append(int(steps.sum(axis=-1).max()))
    return found


def ring_order(
    places: np.ndarray, cores: np.ndarray, sizes: Sequence[int], period: np.ndarray
) -> np.ndarray:
    """Returns the order of the devices along a mesh axis, as indices.

    Of a gather, which goes around one ring after another, the bytes that each sends
    times the links of a step are fewest. The order stays where they are not fewer than
    now, or where the devices fill no box.

    Args:
      places: as in `ring_links`, of all groups of devices along the axis.
      cores: of the devices of the first group, on their chips.
      sizes, period: as in `ring_links`.
    """
    first = places.reshape(len(places), -1, places.shape[-1])[:, 0]
    box = np.concatenate([first, cores[:, None]], axis=1)
    present, parts = np.arange(len(box)), _dimensions(box, [*period, 0])
    if parts is None:
        return present
    _, rings = _cheapest(sizes, parts)
    wanted = np.zeros((1, len(parts)), int)
    for ring in rings:
        wanted = _around(ring, len(parts))[:, None] + wanted
        wanted = wanted.reshape(-1, len(parts))
    # A device's number in the box, and the device with each number.
    numbers = [np.unique(column, return_inverse=True)[1] for column in box.T]
    shape = [part.size for part in parts]
    device_at = np.argsort(np.ravel_multi_index(numbers, shape))
    order = device_at[np.ravel_multi_index(tuple(wanted.T), shape)]

    def cost(order: np.ndarray) -> int:
        links = ring_links(places[order], sizes, period)
        return sum(map(math.prod, zip(_bytes(sizes), links, strict=True)))

    return order if cost(order) < cost(present) else present


def _bytes(sizes: Sequence[int]) -> list[int]:
    """What each ring sends in a gather, in parts of one device."""
    return [(size - 1) * math.prod(sizes[:n]) for n, size in enumerate(sizes)]


def _dimensions(box: np.ndarray, period: Sequence[int]) -> tuple[_Part, ...] | None:
    """The sides of the box that the devices fill; None if they fill none."""
    parts = []
    for dimension, column in enumerate(box.T):
        values = np.unique(column)
        steps = set(np.diff(values).tolist()) or {0}
        if len(steps) > 1:
            return None
        (step,) = steps
        # The last column has the cores of a chip, between which there is no link.
        links = step if dimension + 1 < box.shape[1] else 0
        whole = step and len(values) * step == period[dimension]
        closes = len(values) if whole else 0
        parts.append(_Part(dimension, len(values), 1, links, closes))
    volume = math.prod(part.size for part in parts)
    fills = len(np.unique(box, axis=0)) == len(box) == volume
    return tuple(parts) if fills else None


def _cheapest(
    sizes: Sequence[int], parts: tuple[_Part, ...]
) -> tuple[int, list[list[_Part]]]:
    """Returns bytes times links, of all rings, and the parts that each ring gets."""
    if not sizes:
        return 0, []
    *others, size = sizes
    found = []
    for ring, rest in _choices(size, parts):
        cost, rings = _cheapest(others, rest)
        found.append((cost + _bytes(sizes)[-1] * _links(ring), [*rings, ring]))
    return min(found, key=lambda choice: choice[0])


def _choices(
    size: int, parts: tuple[_Part, ...]
) -> Iterator[tuple[list[_Part], tuple[_Part, ...]]]:
    """Yields the parts that a ring of a size can get, and what they leave."""
    if not parts:
        if size == 1:
            yield [], ()
        return
    first, *others = parts
    for exponent in range(math.gcd(size, first.size).bit_length()):
        taken = 2**exponent
        for fine in (True, False) if 1 < taken < first.size else (True,):
            part, left = first.cut(taken, fine=fine)
            for ring, rest in _choices(size // taken, tuple(others)):
                yield [part] * (taken > 1) + ring, (left, *rest)


def _first(ring: Sequence[_Part]) -> _Part:
    """The part that a ring goes through once; through others it goes to and fro."""
    return min(ring, key=lambda part: (part.is_open, part.links * part.stride))


def _links(ring: Sequence[_Part]) -> int:
    """How many links a step of a ring takes, at most."""
    if not ring:
        return 0
    first = _first(ring)
    # Through an open part it jumps over every other place, and back over those.
    there = first.links * first.stride * (1 + first.is_open)
    return max(there, *(part.links * part.stride for part in ring))


def _around(ring: Sequence[_Part], dimensions: int) -> np.ndarray:
    """Places of a ring's devices in the box, one after another."""
    places = np.zeros((1, dimensions), int)
    if not ring:
        return places
    first = _first(ring)
    for part in (first, *(part for part in ring if part is not first)):
        there = np.arange(part.size)
        if part is first and part.is_open:
            there = np.concatenate([there[::2], there[::-2]])
        steps = np.zeros((part.size, dimensions), int)
        steps[:, part.dimension] = there * part.stride
        places = np.concatenate(
            [place + steps[:: 1 - 2 * (n % 2)] for n, place in enumerate(places)]
        )
    return places
