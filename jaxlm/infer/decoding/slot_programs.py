"""What is compiled to put a row of one batch into a slot of another."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxlm.infer.decoding.decode_state import DecodeState
from jaxlm.ops.layout import layout
from jaxlm.sharding.rules import reshard


def place(arrays: Any) -> Any:
    """Puts each row of arrays [B] or [B, n] on its device."""
    letters = ("B", "B_")
    return jax.tree.map(lambda x: reshard(x, letters[x.ndim - 1]), arrays)


def insert(
    state: DecodeState,
    new: DecodeState,
    row: Int[Array, ""],
    slot: Int[Array, ""],
) -> DecodeState:
    """Returns `state` with a row of `new` in the slot.

    The cache of `new` may be shorter: it is put over the beginning of the slot's.
    """
    hits = jax.tree.map(jnp.add, state.hits, new.hits)
    state, new = (replace(s, hits=()) for s in (state, new))
    # A ring of the slots may be no ring in a cache that is shorter.
    leaves, structure = jax.tree.flatten(state)
    pairs = zip(leaves, jax.tree.leaves(new), strict=True)
    put = [_put_row(x, others, row, slot) for x, others in pairs]
    return replace(jax.tree.unflatten(structure, put), hits=hits)


def _put_row(x: Array, new: Array, row: Int[Array, ""], slot: Int[Array, ""]) -> Array:
    """Puts a row of `new`, [R, ...], over the beginning of that of x, [B, ...]."""

    def put(x, new, row, slot):
        own = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=0)
        rest = (0,) * (x.ndim - 1)
        return jax.lax.dynamic_update_slice(x, own, (slot, *rest))

    sharding = layout(x)
    if sharding is None:
        return put(x, new, row, slot)
    rows, *others = sharding.spec
    axes = (rows,) if isinstance(rows, str) else rows or ()
    new = jax.sharding.reshard(new, P(None, *others))

    def put_on_one_device(x, new, row, slot):
        slot -= jax.lax.axis_index(axes) * len(x) if axes else 0
        at = jnp.clip(slot, 0, len(x) - 1)
        old = jax.lax.dynamic_slice_in_dim(x, at, 1, axis=0)
        own = put(old, new, row, 0)
        return put(x, jnp.where(at == slot, own, old), 0, at)

    return jax.shard_map(
        put_on_one_device,
        in_specs=(sharding.spec, P(None, *others), P(), P()),
        out_specs=sharding.spec,
        check_vma=False,
    )(x, new, row, slot)
