"""Taps: which named values of the forward pass to read, and where they are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm.fields import nearest
from jaxlm.ops.layout import layout
from jaxlm.ops.probing.sites import SITES, check_site


@jax.tree_util.register_static
@dataclass(frozen=True)
class Tap:
    """A site to read. Static: other taps compile another program."""

    site: str
    """A name in `SITES`."""
    layers: tuple[int, ...] | None = None
    """Layers to read, counted from 0; None reads all."""
    positions: tuple[int, ...] | None = field(default=None, kw_only=True)
    """Indices of the call's tokens, -1 is the last; for scores and probabilities those
    of the queries. None reads all."""
    heads: tuple[int, ...] | None = field(default=None, kw_only=True)
    """Heads to read, of keys and values for their sites; None reads all."""
    reduce: str | None = field(default=None, kw_only=True)
    """A name in `REDUCERS`: what to keep of the last axis, f32."""

    @property
    def selects(self) -> bool:
        """Whether it reads less than all of a layer's value."""
        return (self.positions, self.heads, self.reduce) != (None, None, None)

    def take(self, site: str, x: Array, leading: int = 0) -> Array:
        """Returns the chosen tokens and heads of a value of `site`.

        Args:
          leading: how many axes of x, such as the layers, precede the site's.
        """
        for letters, chosen in (("T", self.positions), ("NK", self.heads)):
            axis = SITES[site].axis(letters)
            if chosen is None or axis is None:
                continue
            x = choose(x, axis + leading, chosen)
        return x

    def reduced(self, x: Array) -> Array:
        """Returns what the reducer keeps of x."""
        if self.reduce is None:
            return x
        return REDUCERS[self.reduce](x.astype(jnp.float32))

    def shape(self, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
        """Returns the axes of one layer's value as they are kept, by letter.

        Axes that were chosen from have the letter `_`: they are not sharded.
        """
        chosen = {"T": self.positions, "N": self.heads, "K": self.heads}
        letters = SITES[self.site].shape.split()
        if self.reduce is not None:
            letters = letters[:-1]
        kept = [(c, chosen.get(c)) for c in letters]
        return [(c, sizes[c]) if n is None else ("_", len(n)) for c, n in kept]


REDUCERS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda x: jnp.mean(x, axis=-1),
    "norm": lambda x: jnp.linalg.norm(x, axis=-1),
    "max": lambda x: jnp.max(x, axis=-1),
}


def choose(x: Array, axis: int, indices: Sequence[int]) -> Array:
    """Returns these indices of an axis, which becomes unsharded."""
    placed = layout(x)
    if placed is not None:  # a sharded axis cannot be indexed
        spec = [None if i == axis else s for i, s in enumerate(placed.spec)]
        x = jax.sharding.reshard(x, P(*spec))
    return x[(slice(None),) * axis + (np.array(indices),)]


def check_taps(
    taps: Sequence[Tap], sizes: Mapping[str, int], absent: frozenset[str]
) -> None:
    """Checks a selection.

    Args:
      sizes: size of each letter.
      absent: sites that this model does not have.

    Raises:
      ValueError: for what is no tap, an unknown, absent or duplicate site, an unknown
        reducer, or a layer, position or head out of range.
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
        site = SITES[tap.site]
        if tap.layers is not None and site.outside_layers:
            raise ValueError(f"site {tap.site!r} lies outside the layers: no layers=")
        if tap.heads is not None and site.axis("NK") is None:
            raise ValueError(
                f"tap of {tap.site!r}: [{site.shape}] has no heads: no heads="
            )
        _check_chosen(tap, "layer", tap.layers, 0, sizes["L"])
        _check_chosen(tap, "position", tap.positions, -sizes["T"], sizes["T"])
        heads = sizes["N" if "N" in site.shape else "K"]
        _check_chosen(tap, "head", tap.heads, 0, heads)
        if tap.reduce is not None and tap.reduce not in REDUCERS:
            raise ValueError(
                f"tap of {tap.site!r}: no reducer {tap.reduce!r}"
                f"{nearest(tap.reduce, list(REDUCERS))}: {', '.join(REDUCERS)}"
            )
        if tap.reduce is not None and site.shape == "B T":
            raise ValueError(f"tap of {tap.site!r}: ids are not reduced")


def _check_chosen(tap: Tap, name: str, chosen: Any, first: int, limit: int) -> None:
    if chosen is None:
        return
    where = f"tap of {tap.site!r}"
    if not isinstance(chosen, tuple):
        raise ValueError(
            f"{where}: {name}s is {chosen!r}: give a tuple, such as (0, 1)"
        )
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"{where}: {name}s {chosen} are empty or have duplicates")
    for index in chosen:
        if not first <= index < limit:
            raise ValueError(
                f"{where}: {name} {index} is not among {first} to {limit - 1}"
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
            letters, shape = zip(*tap.shape(sizes), strict=True)
            chosen = num_layers if tap.layers is None else len(tap.layers) + 1
            shape = (chosen, *shape)
            out = partition("L" + "".join(letters))
            is_float32 = SITES[tap.site].float32 or tap.reduce is not None
            slot_dtype = jnp.float32 if is_float32 else dtype
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
            old = slots[tap.site]
            new = tap.reduced(tap.take(tap.site, values[tap.site]))
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
