"""Rows of an embedding table that is cut over devices."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from jaxlm.ops.collectives import axes_of
from jaxlm.ops.layout import layout
from jaxlm.ops.quantization import dequantize_weight
from jaxlm.types import Quantized


def lookup(
    table: Num[Array, "V D"] | Quantized, ids: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Returns the row of each id, rounded to `dtype`; cut over devices as the ids are.

    Devices exchange rows, never the table. Each looks up, in its part of the table,
    the ids of all that hold other columns of it, and sends them their rows in `dtype`.
    The gradient goes the same way back, and is added up in the table's dtype.

    Args:
      ids: in an Explicit mesh, the axes that cut D are among those that cut B.
    """
    if isinstance(table, Quantized):
        parts = (lookup(x, ids, jnp.float32) for x in (table.values, table.scale))
        return dequantize_weight(Quantized(*parts), dtype)
    cut, tokens = layout(table), layout(ids)
    if cut is None or tokens is None:
        return table[ids].astype(dtype)
    if cut.mesh.size == 1:
        # The compiler would keep the sums below, and copy the gradient for them.
        whole = jax.sharding.reshard(table, P())
        rows = whole.at[ids].get(out_sharding=P(*tokens.spec, None))
        return rows.astype(dtype)
    vocabulary, columns = map(axes_of, cut.spec)
    assert set(columns) <= set(axes_of(tokens.spec[0]))
    parts = math.prod(cut.mesh.shape[axis] for axis in vocabulary)

    def local(table, ids):
        if columns:
            ids = jax.lax.all_gather(ids, columns, axis=0, tiled=True)
        if vocabulary:
            ids -= jax.lax.axis_index(vocabulary) * table.shape[0]
        x = table[ids].astype(dtype)
        if parts > 1:
            held = (ids >= 0) & (ids < table.shape[0])
            x = jnp.where(held[..., None], x, 0)
        if vocabulary:
            # All but one are 0, so this rounds nothing.
            x = jax.lax.psum(x, vocabulary)
        if columns:
            x = jax.lax.all_to_all(x, columns, split_axis=0, concat_axis=2, tiled=True)
        return x

    in_specs, out_specs = (cut.spec, tokens.spec), P(*tokens.spec, None)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)(table, ids)
