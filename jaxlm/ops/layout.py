"""Shardings of arrays in an Explicit mesh, read from the types of the arrays.

`ops` does not use the table of rules: a formula shards its results as its inputs are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def layout(x: Array | jax.ShapeDtypeStruct) -> NamedSharding | None:
    """Returns the sharding in x's type; None where no mesh axis is Explicit.

    An array made outside the current mesh counts as replicated in it. Inside a
    `shard_map` of some axes, the sharding is that over the others.
    """
    abstract = isinstance(x, jax.ShapeDtypeStruct)
    sharding = x.sharding if abstract else jax.typeof(x).sharding
    if sharding is None or sharding.mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
        sharding = NamedSharding(mesh, P(*(None,) * x.ndim))
    mesh = sharding.mesh
    kinds = set(mesh.axis_types)
    if AxisType.Explicit not in kinds or AxisType.Auto in kinds:
        return None
    return sharding


def cotangent_layout(x: Array) -> NamedSharding | None:
    """Returns the sharding of a gradient of x; where x is `reduced`, not summed yet."""
    sharding = layout(x)
    if sharding is None:
        return None
    spec = sharding.spec
    return sharding.update(
        spec=spec.update(unreduced=spec.reduced, reduced=spec.unreduced)
    )


def without_reduced(x: Array) -> Array:
    """Returns x with no `reduced` axes, which jax 0.10 refuses in a `shard_map`."""
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, P(*spec.partitions)) if spec.reduced else x


def reshape(x: Array, shape: Sequence[int], kept: Sequence[int | None]) -> Array:
    """`x.reshape(shape)` with an explicit sharding of each dimension.

    Under Explicit axes a plain reshape is ambiguous if a dimension has size 1.

    Args:
      kept: for each dimension of the result, the dimension of x whose sharding it
        takes; None leaves it unsharded.
    """
    sharding = layout(x)
    if sharding is None:
        return x.reshape(shape)
    spec = P(*(None if axis is None else sharding.spec[axis] for axis in kept))
    return jnp.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))
