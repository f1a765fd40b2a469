"""Gathers weights and adds up their gradients, by collective operations of our choice.

Left alone, compilers choose others: twice the bytes, or once for each use.
"""

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a partition."""
    return (entry,) if isinstance(entry, str) else entry or ()


def all_gather(x: Array, partition: P, axes: tuple[str, ...]) -> Array:
    """Returns x, which is cut as `partition` says, whole along the mesh axes `axes`."""

    def local(x):
        for dimension, cut in enumerate(_only(partition, axes)):
            if cut is not None:
                x = jax.lax.all_gather(x, cut, axis=dimension, tiled=True)
        return x

    out = _without(partition, axes)
    return jax.shard_map(local, in_specs=partition, out_specs=out, check_vma=False)(x)


def psum_scatter(x: Array, partition: P, axes: tuple[str, ...]) -> Array:
    """Adds up arrays, one of each device along `axes`, and cuts them by `partition`.

    Args:
      x: the arrays, stacked; the first dimension is cut over `axes`.
      partition: of the result.
    """

    def local(x):
        x, rest = x[0], set(axes)
        for dimension, cut in enumerate(_only(partition, axes)):
            if cut is not None:
                x = jax.lax.psum_scatter(
                    x, cut, scatter_dimension=dimension, tiled=True
                )
                rest -= set(axes_of(cut))
        return jax.lax.psum(x, tuple(a for a in axes if a in rest)) if rest else x

    stacked = P(axes, *_without(partition, axes))
    return jax.shard_map(local, in_specs=stacked, out_specs=partition, check_vma=False)(
        x
    )


def _only(partition: P, axes: tuple[str, ...]) -> P:
    kept = [tuple(a for a in axes_of(entry) if a in axes) for entry in partition]
    return P(*(entry or None for entry in kept))


def _without(partition: P, axes: tuple[str, ...]) -> P:
    kept = [tuple(a for a in axes_of(entry) if a not in axes) for entry in partition]
    return P(*(entry or None for entry in kept))
