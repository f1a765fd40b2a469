"""Taps: which named values of the forward pass to read, and what is kept of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm.fields import nearest
from jaxlm.ops.layout import layout
from jaxlm.ops.probing.sites import SITES, check_chosen, check_site

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tap:
    """A site to read. Static but for the direction: others compile another program."""

    site: str = field(metadata=_STATIC)
    """A name in `SITES`."""
    layers: tuple[int, ...] | None = field(default=None, metadata=_STATIC)
    """Layers to read, counted from 0; None reads all."""
    positions: tuple[int, ...] | None = field(
        default=None, kw_only=True, metadata=_STATIC
    )
    """Indices of the call's tokens, -1 is the last; for scores and probabilities those
    of the queries. None reads all."""
    heads: tuple[int, ...] | None = field(default=None, kw_only=True, metadata=_STATIC)
    """Heads to read, of keys and values for their sites; None reads all."""
    reduce: str | None = field(default=None, kw_only=True, metadata=_STATIC)
    """A name in `REDUCERS`: what to keep of the last axis, f32."""
    direction: Any = field(default=None, kw_only=True)
    """For `dot`: a vector of the last axis's size."""
    count: int | None = field(default=None, kw_only=True, metadata=_STATIC)
    """For `top_k`: how many to keep."""

    @property
    def selects(self) -> bool:
        """Whether it reads less than all of a layer's value."""
        return (self.positions, self.heads, self.reduce) != (None, None, None)

    def take(self, x: Array, site: str | None = None, leading: int = 0) -> Array:
        """Returns the chosen tokens and heads of a value.

        Args:
          site: whose value it is, if it is a source of the tap's site.
          leading: how many axes of x, such as the layers, precede the site's.
        """
        for letters, chosen in (("T", self.positions), ("NK", self.heads)):
            axis = SITES[site or self.site].axis(letters)
            if chosen is None or axis is None:
                continue
            x = choose(x, axis + leading, chosen)
        return x

    def reduced(self, x: Array) -> Any:
        """Returns what the reducer keeps of x: an array, or `Largest`."""
        if self.reduce is None:
            return x
        return REDUCERS[self.reduce](x.astype(jnp.float32), self)

    def shape(self, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
        """Returns the axes of one layer's value as they are kept, by letter.

        Axes that were chosen from have the letter `_`: they are not sharded.
        """
        chosen = {"T": self.positions, "N": self.heads, "K": self.heads}
        letters = SITES[self.site].shape.split()
        kept = [(c, chosen.get(c)) for c in letters]
        axes = [(c, sizes[c]) if n is None else ("_", len(n)) for c, n in kept]
        if self.reduce is None:
            return axes
        return [*axes[:-1], *([("_", self.count)] if self.count else [])]

    def dtype(self, dtype: Any) -> Any:
        """Returns the dtype of what is kept, where the model computes in `dtype`."""
        is_float32 = SITES[self.site].float32 or self.reduce is not None
        return jnp.float32 if is_float32 else dtype


class Largest(NamedTuple):
    """What `top_k` keeps, the largest first."""

    values: Any
    """f32."""
    indices: Any
    """int32, along the last axis of the site."""


def _dot(x: Array, tap: Tap) -> Array:
    vector, placed = jnp.asarray(tap.direction, jnp.float32), layout(x)
    if placed is not None:
        vector = jax.sharding.reshard(vector, P(placed.spec[-1]))
    return jnp.sum(x * vector, axis=-1)


def _top_k(x: Array, tap: Tap) -> Largest:
    assert tap.count is not None
    placed = layout(x)
    if placed is not None:
        x = jax.sharding.reshard(x, P(*placed.spec[:-1], None))
    return Largest(*jax.lax.top_k(x, tap.count))


REDUCERS: dict[str, Callable[[Array, Tap], Any]] = {
    "mean": lambda x, _: jnp.mean(x, axis=-1),
    "norm": lambda x, _: jnp.linalg.norm(x, axis=-1),
    "max": lambda x, _: jnp.max(x, axis=-1),
    "dot": _dot,
    "top_k": _top_k,
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
        reducer or one without what it needs, or a layer, position or head out of range.
    """
    if isinstance(taps, str | Tap):
        raise ValueError(f"taps is {taps!r}: give a tuple of taps, (Tap(...),)")
    seen = set()
    for tap in taps:
        if not isinstance(tap, Tap):
            raise ValueError(f"taps has {tap!r}, which is no Tap: give Tap({tap!r})")
        check_site(tap.site, absent)
        where = f"tap of {tap.site!r}"
        if tap.site in seen:
            raise ValueError(f"site {tap.site!r} is tapped twice: join its layers")
        seen.add(tap.site)
        names = ("layers", "positions", "heads")
        chosen = {name: getattr(tap, name) for name in names}
        for name, indices in chosen.items():
            if indices is None:
                continue
            if not isinstance(indices, tuple):
                raise ValueError(
                    f"{where}: {name} is {indices!r}: give a tuple, such as (0, 1)"
                )
            if not indices or len(set(indices)) != len(indices):
                raise ValueError(
                    f"{where}: {name} {indices} are empty or have duplicates"
                )
        check_chosen(where, SITES[tap.site], chosen, sizes)
        _check_reducer(where, tap, sizes)


def _check_reducer(where: str, tap: Tap, sizes: Mapping[str, int]) -> None:
    letters = SITES[tap.site].shape.split()
    for reducer, name in (("dot", "direction"), ("top_k", "count")):
        given = getattr(tap, name) is not None
        if given != (tap.reduce == reducer):
            needs = f"belongs to reduce={reducer!r}" if given else "is missing"
            raise ValueError(f"{where}: {name} {needs}")
    if tap.reduce is None:
        return
    if tap.reduce not in REDUCERS:
        raise ValueError(
            f"{where}: no reducer {tap.reduce!r}"
            f"{nearest(tap.reduce, list(REDUCERS))}: {', '.join(REDUCERS)}"
        )
    if letters == ["B", "T"]:
        raise ValueError(f"{where}: ids are not reduced")
    size = sizes[letters[-1]]
    if tap.reduce == "dot" and jnp.shape(tap.direction) != (size,):
        raise ValueError(
            f"{where}: direction has shape {jnp.shape(tap.direction)}, and the last "
            f"axis of [{SITES[tap.site].shape}] needs ({size},)"
        )
    if tap.reduce == "top_k" and not 0 < (tap.count or 0) <= size:
        raise ValueError(f"{where}: count {tap.count} is not among 1 to {size}")
