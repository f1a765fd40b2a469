"""`Recorder`: what taps have read in the layers so far, carried from layer to layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm.ops.layout import layout
from jaxlm.ops.probing.tap import Largest, Tap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorder:
    """Recorded values, each in its slot; and how often each edit has fired.

    A spare slot absorbs writes of untapped layers, since the layer number is traced in
    a scan.
    """

    layers: tuple[tuple[str, tuple[int, ...]], ...] = field(metadata={"static": True})
    """Sites, and their layers that are recorded, in the order of the slots."""
    slots: Mapping[str, Any]
    """Site -> [slots, *shape of what is kept]; of `Largest` two such arrays."""
    hits: tuple[Any, ...] = ()
    """Of each edit, int32."""

    @classmethod
    def empty(
        cls,
        taps: Sequence[Tap],
        layers: Sequence[int],
        sizes: Mapping[str, int],
        dtype: Any,
        partition: Callable[[str], P | None],
        num_edits: int = 0,
    ) -> "Recorder":
        """Returns a recorder whose slots are zeros.

        Args:
          taps: recorded sites inside the layers.
          layers: those that run.
          sizes: size of each letter in the shapes of sites.
          dtype: the compute dtype.
          partition: maps letters to a partition in the current mesh, or None.
        """

        def zeros(tap: Tap) -> Any:
            letters, shape = zip(*tap.shape(sizes), strict=True)
            spare = tap.layers is not None and set(tap.layers) != set(layers)
            chosen = len(tap.layers or layers) + spare
            out = partition("L" + "".join(letters))
            values = jnp.zeros((chosen, *shape), tap.dtype(dtype), out_sharding=out)
            if tap.count is None:
                return values
            return Largest(values, jnp.zeros_like(values, jnp.int32))

        hits = (jnp.zeros((), jnp.int32),) * num_edits
        slots = {tap.site: zeros(tap) for tap in taps}
        chosen = tuple((tap.site, tap.layers or tuple(layers)) for tap in taps)
        return cls(chosen, slots, hits)

    def write(
        self, layer: Any, values: Mapping[str, Any], hits: Sequence[Any]
    ) -> "Recorder":
        """Returns a recorder with one layer's values written, and its hits added.

        `layer` may be traced.
        """
        slots = dict(self.slots)
        for site, layers in self.layers:
            if isinstance(layer, int):
                if layer not in layers:
                    continue
                slot = layers.index(layer)
            else:
                table = np.full(max(layers) + 1, len(layers))
                table[list(layers)] = np.arange(len(layers))
                # A layer after the last of them takes the spare slot too.
                slot = jnp.asarray(np.append(table, len(layers)))[layer]
            write = _writer(slot)
            slots[site] = jax.tree.map(write, slots[site], values[site])
        total = tuple(a + b for a, b in zip(self.hits, hits, strict=True))
        return Recorder(self.layers, slots, total)

    def read(self, site: str) -> Any:
        """Returns [layers, *shape], in the order of the tap."""
        count = len(dict(self.layers)[site])
        return jax.tree.map(
            lambda x: x if len(x) == count else x[:count], self.slots[site]
        )


def _writer(slot: Any) -> Callable[[Array, Array], Array]:
    """Returns a function that puts one layer's value into a slot."""

    def write(old: Array, new: Array) -> Array:
        assert (new.shape, new.dtype) == (old.shape[1:], old.dtype)
        placed = layout(old)
        if placed is not None:
            new = jax.sharding.reshard(new, P(*placed.spec[1:]))
        return jax.lax.dynamic_update_index_in_dim(old, new, slot, 0)

    return write
