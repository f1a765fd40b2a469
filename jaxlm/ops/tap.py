"""Taps: which named values of the forward pass to read, and where they are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm.ops.layout import layout
from jaxlm.ops.sites import SITES, check_site


@jax.tree_util.register_static
@dataclass(frozen=True)
class Tap:
    """A site to read. Static: other taps compile another program."""

    site: str
    """A name in `SITES`."""
    layers: tuple[int, ...] | None = None
    """Layers to read, counted from 0; None reads all."""


def check_taps(taps: Sequence[Tap], num_layers: int, absent: frozenset[str]) -> None:
    """Checks a selection.

    Args:
      absent: sites that this model does not have.

    Raises:
      ValueError: for what is no tap, an unknown, absent or duplicate site, or a layer
        out of range.
    """
    if isinstance(taps, str | Tap):
        raise ValueError(f"taps is {taps!r}: give a tuple of taps, (Tap(...),)")
    seen = set()
    for tap in taps:
        if not isinstance(tap, Tap):
            raise ValueError(f"taps has {tap!r}, which is no Tap: give Tap({tap!r})")
        check_site(tap.site, absent)
        if tap.site in seen:
            raise ValueError(f"site {tap.site!r} is tapped twice: join its layers")
        seen.add(tap.site)
        if tap.layers is None:
            continue
        if SITES[tap.site].outside_layers:
            raise ValueError(f"site {tap.site!r} lies outside the layers: no layers=")
        if not isinstance(tap.layers, tuple):
            raise ValueError(
                f"tap of {tap.site!r}: layers is {tap.layers!r}: give a tuple, such as "
                "(0, 1)"
            )
        if not tap.layers or len(set(tap.layers)) != len(tap.layers):
            raise ValueError(
                f"tap of {tap.site!r}: layers {tap.layers} are empty or have duplicates"
            )
        for layer in tap.layers:
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"tap of {tap.site!r}: layer {layer} is not among 0 to "
                    f"{num_layers - 1}"
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorder:
    """Recorded values of all layers, each in its slot; carried from layer to layer.

    A spare slot absorbs writes of untapped layers, since the layer number is traced in
    a scan.
    """

    taps: tuple[Tap, ...] = field(metadata={"static": True})
    num_layers: int = field(metadata={"static": True})
    # `Any`: see `jaxlm/types.py` on leaves.
    slots: Mapping[str, Any]
    """Site -> [slots, *shape of the site]."""
    hits: tuple[Any, ...] = ()
    """How often each edit has fired, int32."""

    @classmethod
    def empty(
        cls,
        taps: Sequence[Tap],
        num_layers: int,
        sizes: Mapping[str, int],
        dtype: Any,
        partition: Callable[[str], P | None],
        num_edits: int = 0,
    ) -> "Recorder":
        """Returns a recorder whose slots are zeros.

        Args:
          taps: recorded sites inside the layers.
          sizes: size of each letter in their shapes.
          dtype: the compute dtype.
          partition: maps letters to a partition in the current mesh, or None.
        """

        def zeros(tap: Tap) -> Array:
            letters = SITES[tap.site].shape.split()
            chosen = num_layers if tap.layers is None else len(tap.layers) + 1
            shape = (chosen, *(sizes[letter] for letter in letters))
            out = partition("L" + "".join(letters))
            slot_dtype = jnp.float32 if SITES[tap.site].float32 else dtype
            return jnp.zeros(shape, slot_dtype, out_sharding=out)

        hits = (jnp.zeros((), jnp.int32),) * num_edits
        slots = {tap.site: zeros(tap) for tap in taps}
        return cls(tuple(taps), num_layers, slots, hits)

    def write(
        self, layer: Any, values: Mapping[str, Array], hits: Sequence[Any]
    ) -> "Recorder":
        """Returns a recorder with one layer's values written, and its hits added.

        `layer` may be traced.
        """
        slots = dict(self.slots)
        for tap in self.taps:
            layers = tap.layers or range(self.num_layers)
            if isinstance(layer, int) and layer not in layers:
                continue
            old, new = slots[tap.site], values[tap.site]
            assert (new.shape, new.dtype) == (old.shape[1:], old.dtype), tap.site
            placed = layout(old)
            if placed is not None:
                new = jax.sharding.reshard(new, P(*placed.spec[1:]))
            slot = self._slots_of(tap)[layer]
            slots[tap.site] = jax.lax.dynamic_update_index_in_dim(old, new, slot, 0)
        total = tuple(a + b for a, b in zip(self.hits, hits, strict=True))
        return Recorder(self.taps, self.num_layers, slots, total)

    def read(self) -> dict[str, Array]:
        """Returns site -> [layers of its tap, *shape], in the order of the tap."""
        return {
            tap.site: self.slots[tap.site]
            if tap.layers is None
            else self.slots[tap.site][: len(tap.layers)]
            for tap in self.taps
        }

    def _slots_of(self, tap: Tap) -> Array:
        """Returns the slot of each layer."""
        layers = range(self.num_layers) if tap.layers is None else tap.layers
        slots = np.full(self.num_layers, len(layers))
        slots[list(layers)] = np.arange(len(layers))
        return jnp.asarray(slots)
