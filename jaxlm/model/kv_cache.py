"""The key/value cache: a value that is passed in, returned, and never changed."""

from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.checks import check_config, concrete_values
from jaxlm.sharding.rules import activation_spec


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


def init_cache(
    config: ModelConfig, batch_size: int, max_length: int, dtype: Any
) -> Cache:
    """Makes an empty cache, stacked over layers: [L, B, max_length, K, H] in `dtype`.

    Raises:
      ValueError: when `max_length` is more than the model's context.
    """
    check_config(config)
    if max_length > config.context_length:
        raise ValueError(
            f"a cache of {max_length} tokens is longer than model.context_length "
            f"{config.context_length}"
        )
    shape = (config.num_layers, batch_size, max_length)
    shape += (config.num_kv_heads, config.head_dim)
    partition = activation_spec("LBSKH")

    def zeros() -> Float[Array, "L B S K H"]:
        return jnp.zeros(shape, dtype, out_sharding=partition)

    lengths = jnp.zeros(batch_size, jnp.int32, out_sharding=activation_spec("B"))
    return Cache(layers=LayerCache(zeros(), zeros()), lengths=lengths)


def check_room(cache: Cache, num_tokens: int) -> None:
    """Raises ValueError if a row has no room for more tokens, unless it is traced."""
    layers = cache.layers
    keys = layers[0].keys if isinstance(layers, tuple) else layers.keys
    room, lengths = keys.shape[-3], concrete_values(cache.lengths)
    if lengths is not None and lengths.max() + num_tokens > room:
        raise ValueError(
            f"the cache holds {lengths.max()} of {room} tokens, and {num_tokens} more "
            "do not fit: make a longer one with init_cache"
        )


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


def unstack(tree: Any, num_layers: int) -> tuple[Any, ...]:
    """Splits stacked layers (parameters or cache) into one tree per layer."""
    return tuple(jax.tree.map(itemgetter(i), tree) for i in range(num_layers))
