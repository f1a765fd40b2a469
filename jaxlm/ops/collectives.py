"""Gathers weights and adds up their gradients, by collective operations of our choice.

Left alone, compilers choose others: twice the bytes, or once for each use.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm.ops.layout import layout, without_reduced
from jaxlm.ops.rings import gather_around, rings_along, scatter_around
from jaxlm.torus import permutes_beside, ring_sizes, torus_dimensions


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a partition."""
    return (entry,) if isinstance(entry, str) else entry or ()


def gathered_axes(equation: str, x: Array, w: Array) -> tuple[str, ...]:
    """Returns the mesh axes, of several devices, along which `einsum(x, w)` gathers w.

    They cut w and x, but not along the same dimension.
    """
    first, second = layout(x), layout(w)
    if first is None or second is None:
        return ()
    x_letters, w_letters = equation.partition("->")[0].split(",")
    cut_x, cut_w = (
        {axis: letter for letter, entry in cuts for axis in axes_of(entry)}
        for cuts in (
            zip(x_letters, first.spec.partitions, strict=True),
            zip(w_letters, second.spec.partitions, strict=True),
        )
    )
    return tuple(
        axis
        for axis, size in first.mesh.shape.items()
        if size > 1 and axis in cut_x and cut_w.get(axis, cut_x[axis]) != cut_x[axis]
    )


def all_gather(x: Array, partition: P, axes: tuple[str, ...]) -> Array:
    """Returns x, which is cut as `partition` says, whole along the mesh axes `axes`."""
    local = partial(all_gather_parts, partition=partition, axes=axes)
    out = _without(partition, axes)
    return jax.shard_map(local, in_specs=partition, out_specs=out, check_vma=False)(x)


def all_gather_parts(x: Array, partition: P, axes: tuple[str, ...]) -> Array:
    """As `all_gather`, from each device's part of x, inside a `shard_map`."""
    for dimension, cut in enumerate(_only(partition, axes)):
        sizes = _rings(cut)
        if _by_permutes(sizes):
            for ring in rings_along(axes_of(cut), sizes):
                x = gather_around(ring, dimension, x)
            continue
        # Two rings at once.
        sizes = [*sizes[:-2], math.prod(sizes[-2:])]
        for groups in _groups(sizes) if cut else ():
            x = jax.lax.all_gather(
                x, cut, axis=dimension, tiled=True, axis_index_groups=groups
            )
    return x


def psum_scatter(x: Array, partition: P, axes: tuple[str, ...]) -> Array:
    """Adds up arrays, one of each device along `axes`, and cuts them by `partition`.

    Args:
      x: the arrays, stacked; the first dimension is cut over `axes`.
      partition: of the result.
    """
    local = partial(psum_scatter_parts, partition=partition, axes=axes)
    stacked = P(axes, *_without(partition, axes))
    # Checked, so that the gradient of a whole sum is not exchanged again.
    return jax.shard_map(lambda x: local(x[0]), in_specs=stacked, out_specs=partition)(
        x
    )


def psum_scatter_parts(x: Array, partition: P, axes: tuple[str, ...]) -> Array:
    """As `psum_scatter`, from each device's array, inside a `shard_map`."""
    rest = set(axes)
    for dimension, cut in enumerate(_only(partition, axes)):
        rest -= set(axes_of(cut))
        sizes = _rings(cut)
        if _by_permutes(sizes):
            for ring in reversed(rings_along(axes_of(cut), sizes)):
                x = scatter_around(ring, dimension, x)
            continue
        for groups in reversed(_groups(sizes)) if cut else ():
            x = jax.lax.psum_scatter(
                x,
                cut,
                scatter_dimension=dimension,
                tiled=True,
                axis_index_groups=groups,
            )
    return jax.lax.psum(x, tuple(a for a in axes if a in rest)) if rest else x


def sum_over_tokens(
    product: Callable[..., Array], arrays: Sequence[Array], like: Array
) -> Array:
    """Returns `product(*arrays, out_sharding=...)`, a gradient that sums over tokens.

    Each device computes its part, from its rows; the parts are added up once, and cut
    as the array `like`.

    Args:
      arrays: activations, whose first dimensions (rows, tokens of a row) are cut over
        devices, and are summed.
    """
    cut, layouts = layout(like), [layout(array) for array in arrays]
    assert cut is not None and None not in layouts
    entries = zip(*(each.spec.partitions[:2] for each in layouts if each), strict=False)
    alike = takewhile(lambda entry: len({*map(axes_of, entry)}) == 1, entries)
    tokens = P(*(first for first, *_ in alike))
    axes = tuple(axis for entry in tokens for axis in axes_of(entry))
    inside = _without(cut.spec, axes)

    def local(*arrays):
        return product(*arrays, out_sharding=inside)[None]

    parts: Any = jax.shard_map(
        local,
        in_specs=(tokens,) * len(arrays),
        out_specs=P(axes),
        axis_names=set(axes),
        check_vma=False,
    )
    return psum_scatter(parts(*map(without_reduced, arrays)), cut.spec, axes)


def _device_kind() -> str:
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None else device.device_kind


def _by_permutes(sizes: Sequence[int]) -> bool:
    """Whether gathers and scatters along rings of these sizes go by permutes."""
    return len(sizes) > 1 and permutes_beside(_device_kind())


def compiler_scatters(axes: tuple[str, ...]) -> bool:
    """Whether the compiler adds gradients up along `axes` by scatters, overlapped.

    Those for GPUs do, and those for TPUs with a torus of two dimensions up to 16 chips;
    otherwise they reduce gradients whole.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    chips = math.prod(shape[axis] for axis in axes)
    return torus_dimensions(_device_kind()) < (3 if chips <= 16 else 2)


def _rings(cut: str | tuple[str, ...] | None) -> list[int]:
    """Returns the sizes of the rings that the devices along `cut` form.

    Compilers for TPUs scatter along one ring, and gather along two; where there are
    more they reduce all, with twice the bytes.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    return ring_sizes(
        math.prod(shape[axis] for axis in axes_of(cut)),
        torus_dimensions(_device_kind()),
    )


def _groups(sizes: Sequence[int]) -> list[list[list[int]] | None]:
    """Returns who exchanges with whom, in stages of groups of these sizes."""
    sizes = [size for size in sizes if size > 1]
    if len(sizes) < 2:
        return [None]
    stages, stride, count = [], 1, math.prod(sizes)
    for size in sizes:
        firsts = [i for i in range(count) if i // stride % size == 0]
        stages.append([[i + k * stride for k in range(size)] for i in firsts])
        stride *= size
    return stages


def _only(partition: P, axes: tuple[str, ...]) -> P:
    kept = [tuple(a for a in axes_of(entry) if a in axes) for entry in partition]
    return P(*(entry or None for entry in kept))


def _without(partition: P, axes: tuple[str, ...]) -> P:
    kept = [tuple(a for a in axes_of(entry) if a not in axes) for entry in partition]
    return P(*(entry or None for entry in kept))
