"""The key/value cache: a value that is passed in, returned, and never changed."""

from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (after RoPE) and values of one layer, or of stacked layers."""

    # `Any`: see `jaxlm/types.py` on leaves.
    keys: Any
    """[B, S, K, H], or stacked [L, B, S, K, H]; any float dtype."""
    values: Any
    """Same shape as the keys."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far."""

    layers: LayerCache | tuple[LayerCache, ...]
    """Stacked over layers, or one per layer, matching the layout of the parameters."""
    lengths: Any
    """[B] int32: tokens in the cache, also the index where the next one is written."""
    is_empty: bool = field(default=False, metadata={"static": True})
    """Promises that `lengths` are 0. The new tokens then attend to each other only, and
    not to the whole of a cache of which they fill a part."""
    is_kept: bool = field(default=True, metadata={"static": True})
    """Whether the call returns it with the new tokens. If not, nothing of it is
    copied: many continuations of one text read the same value in one program."""

    @property
    def max_length(self) -> int:
        """Tokens for which each row has room."""
        layers = self.layers[0] if isinstance(self.layers, tuple) else self.layers
        return layers.keys.shape[-3]


def append(
    cache: LayerCache,
    lengths: Int[Array, " B"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
) -> LayerCache:
    """Returns one layer's cache with T more tokens in each row, from `lengths` on."""

    def write(old: Array, new: Array, start: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            old, new.astype(old.dtype), start, axis=0
        )

    return LayerCache(
        keys=jax.vmap(write)(cache.keys, keys, lengths),
        values=jax.vmap(write)(cache.values, values, lengths),
    )
