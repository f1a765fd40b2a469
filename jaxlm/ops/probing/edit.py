"""Edits: changes of named values while the model computes.

An edit is a pytree. Its site and its operation are static; value, layer, position and
head are traced, so a sweep over them compiles once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from jaxtyping import Array, Int

from jaxlm.fields import nearest
from jaxlm.ops.layout import layout
from jaxlm.ops.probing.sites import SITES, check_chosen, check_site


def _project_out(x: Array, v: Array) -> Array:
    """Removes the component of x along v, which need not have length 1."""
    x32, v32 = x.astype(jnp.float32), jnp.asarray(v, jnp.float32)
    length = jnp.sum(jnp.square(v32), axis=-1, keepdims=True)
    share = jnp.sum(x32 * v32, axis=-1, keepdims=True) / jnp.maximum(length, 1e-30)
    return x32 - share * v32


OPERATIONS: dict[str, Callable[[Array, Any], Array]] = {
    "set": lambda x, value: value,
    "add": lambda x, value: x + value,
    "scale": lambda x, value: x * value,
    "project_out": _project_out,
    "freeze": lambda x, _: jax.lax.stop_gradient(x),
    "call": lambda x, function: function(x),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a site, for `forward` and `generate`.

    `jax.vmap` over its arrays runs many edits in one program. Differentiate with
    respect to `value` only: the others are integers.
    """

    # `Any`: see `jaxlm/types.py` on leaves.
    site: str = field(metadata={"static": True})
    """A name in `SITES`."""
    op: str = field(metadata={"static": True})
    """`set`, `add` or `scale` (by the value), `project_out` (the component along the
    value), `freeze` (the site has no gradient), or `call` (the value is a function)."""
    value: Any = None
    """Broadcasts against one layer's value of the site; with one more axis in front,
    `[L, ...]`, it has an entry for each layer, as a trace of all layers has. None for
    `freeze`. For `call` a function of one layer's whole value; arrays that it reads
    are traced if it is a `jax.tree_util.Partial` of them."""
    layer: Any = field(default=None, kw_only=True)
    """An integer or several, counted from 0; None edits all layers."""
    position: Any = field(default=None, kw_only=True)
    """Positions of tokens in their text, likewise; for scores and probabilities those
    of the queries. They mean the same with and without a cache."""
    head: Any = field(default=None, kw_only=True)
    """Heads, likewise: query heads, or those of keys and values for their sites."""
    reads: str | None = field(default=None, kw_only=True, metadata={"static": True})
    """For `call`: an earlier site of the same layer whose value the function gets, in
    place of the edited site's own."""

    def __post_init__(self):
        if callable(self.value) and not isinstance(self.value, Partial):
            object.__setattr__(self, "value", Partial(self.value))
        for name in ("layer", "position", "head"):
            if isinstance(getattr(self, name), list | tuple | range):
                object.__setattr__(self, name, np.asarray(getattr(self, name)))

    def __call__(
        self, x: Array, layer: Any, positions: Int[Array, "B T"], read: Array
    ) -> tuple[Array, Int[Array, ""]]:
        """Returns the edited value, and how often the edit has fired.

        Args:
          x: the value of one layer.
          layer: its number, which may be traced; None outside the layers.
          positions: of the tokens.
          read: what the operation starts from: x, or the value of the site `reads`.

        Raises:
          ValueError: when the value does not fit the site.
        """
        site, mask = SITES[self.site], jnp.ones((1,) * x.ndim, bool)
        if self.layer is not None:
            mask &= jnp.any(layer == jnp.asarray(self.layer))
        if self.position is not None:
            chosen = positions[..., None] == jnp.atleast_1d(self.position)
            tokens = site.axis("T")
            assert tokens is not None, site
            mask &= _along(chosen.any(-1), (0, tokens), x.ndim)
        if self.head is not None:
            heads = site.axis("NK")
            assert heads is not None, site
            numbers = jnp.arange(x.shape[heads])
            chosen = numbers[:, None] == jnp.atleast_1d(self.head)
            mask &= _along(chosen.any(-1), (heads,), x.ndim)
        new = jnp.asarray(OPERATIONS[self.op](read, self._value_for(x, layer)), x.dtype)
        self._check_shape("result", new.shape, new.shape, x)
        x = jnp.where(_like(x, mask), _like(x, new), x)
        return x, jnp.sum(mask, dtype=jnp.int32)

    def _value_for(self, x: Array, layer: Any) -> Any:
        """Returns the value for this layer, laid out like x."""
        value = self.value
        if self.op in ("freeze", "call"):
            return value
        shape = jnp.shape(value)
        if len(shape) == x.ndim + 1 and layer is not None:
            value = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
        self._check_shape("value", jnp.shape(value), shape, x)
        out, sizes = layout(x), jnp.shape(value)
        if out is None or not sizes:
            return value
        axes = out.spec[x.ndim - len(sizes) :]
        spec = [axis if n > 1 else None for axis, n in zip(axes, sizes, strict=True)]
        return jax.sharding.reshard(jnp.asarray(value), P(*spec))

    def _check_shape(
        self, name: str, shape: tuple[int, ...], given: tuple[int, ...], x: Array
    ) -> None:
        try:
            fits = jnp.broadcast_shapes(shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"edit of {self.site!r}: {name} has shape {given}, which does not "
                f"broadcast to {x.shape}, the site's [{SITES[self.site].shape}]"
            )


def _like(x: Array, y: Array) -> Array:
    """Returns y broadcast to the shape of x, and laid out like it."""
    y, out = jnp.broadcast_to(y, x.shape), layout(x)
    return y if out is None else jax.sharding.reshard(y, out)


def _along(mask: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """Returns the mask with its axes at `axes`, and size 1 elsewhere."""
    return jnp.expand_dims(mask, [i for i in range(ndim) if i not in axes])


def check_edits(
    edits: Sequence[Edit], sizes: Mapping[str, int], absent: frozenset[str]
) -> None:
    """Checks edits, as far as they are not traced.

    Args:
      sizes: size of each letter.
      absent: sites that this model does not have.

    Raises:
      ValueError: for what is no edit, a site that is unknown, absent or cannot be
        edited, an unknown operation, a value that is missing, or a layer, position or
        head that cannot be.
    """
    if isinstance(edits, Edit) or not isinstance(edits, Sequence):
        raise ValueError(f"edits is {edits!r}: give a tuple of edits, (Edit(...),)")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise ValueError(f"edits has {edit!r}, which is no Edit")
        check_site(edit.site, absent)
        _check_edit(edit, sizes, absent)


def _check_edit(edit: Edit, sizes: Mapping[str, int], absent: frozenset[str]) -> None:
    site, where = SITES[edit.site], f"edit of {edit.site!r}"
    if site.edit_instead is not None:
        raise ValueError(
            f"{where}: it is computed aside, so nothing would follow from an edit; "
            f"edit {site.edit_instead!r}"
        )
    if edit.op not in OPERATIONS:
        raise ValueError(
            f"{where}: no operation {edit.op!r}{nearest(edit.op, list(OPERATIONS))}; "
            f"operations: {', '.join(OPERATIONS)}"
        )
    if edit.site == "tokens" and edit.op not in ("set", "call"):
        raise ValueError(f"{where}: ids can be set, and have no {edit.op!r}")
    if edit.op == "set" and edit.site == "tokens":
        _check_ids(where, edit.value, sizes["V"])
    if (edit.value is None) != (edit.op == "freeze"):
        needs = "takes no value" if edit.op == "freeze" else "needs a value"
        raise ValueError(f"{where}: {edit.op!r} {needs}")
    if isinstance(edit.value, Partial) != (edit.op == "call"):
        needs = "a function" if edit.op == "call" else "an array or a number"
        raise ValueError(f"{where}: the value of {edit.op!r} is {needs}")
    if edit.reads is not None:
        check_site(edit.reads, absent)
        if edit.op != "call":
            raise ValueError(f"{where}: only 'call' reads another site")
        if site.outside_layers or SITES[edit.reads].outside_layers:
            raise ValueError(f"{where}: {edit.reads!r} is not read in the same layer")
    chosen = {name: getattr(edit, name) for name in ("layer", "position", "head")}
    check_chosen(where, site, chosen, sizes)
    if edit.op in ("freeze", "call") or site.outside_layers:
        return
    shape = np.shape(edit.value)
    per_layer = len(shape) == len(site.shape.split()) + 1
    if per_layer and shape[0] != sizes["L"]:
        raise ValueError(
            f"{where}: value has shape {shape}, and {sizes['L']} layers need an entry "
            "each"
        )


def _check_ids(where: str, value: Any, vocab_size: int) -> None:
    """Raises ValueError for ids that are not in the vocabulary, unless traced."""
    if isinstance(value, Tracer) or value is None:
        return
    ids = np.asarray(value)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{where}: the value is of {ids.dtype}: ids are integers")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{where}: the value has the id {wrong.flat[0]}: ids are 0 to "
            f"{vocab_size - 1}"
        )


def total_hits(edits: Sequence[Edit], *parts: Sequence[Any]) -> tuple[Any, ...]:
    """Adds up how often each edit has fired; outside of jit an edit must have.

    Raises:
      ValueError: outside of jit for an edit that has changed nothing.
    """
    hits = tuple(sum(counts) for counts in zip(*parts, strict=True))
    if not any(isinstance(count, Tracer) for count in hits):
        check_hits(edits, hits)
    return hits


def check_hits(edits: Sequence[Edit], hits: Sequence[Any]) -> None:
    """Checks that each edit has fired, after the call.

    `forward` does it by itself outside of jit, and `generate` always; in a program of
    your own return `Output.hits`.

    Args:
      hits: of `Output`; with further axes, as after a `vmap`, all entries count.

    Raises:
      ValueError: for an edit that has changed nothing.
    """
    for edit, count in zip(edits, hits, strict=True):
        if np.any(np.asarray(count) == 0):
            chosen = [
                f"{name} {np.asarray(getattr(edit, name)).tolist()}"
                for name in ("layer", "position", "head")
                if getattr(edit, name) is not None
            ]
            raise ValueError(
                f"edit of {edit.site!r} has changed nothing: {', '.join(chosen)} did "
                "not occur in this call"
            )
