"""The key/value cache as it fills: what is stored, how large it is, who reads it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.block import layer_kinds
from jaxlm.ops.linear import compute_dtype


class CacheContents(NamedTuple):
    """What a cache holds after T tokens."""

    key_lengths: Float[Array, "L B T K"]
    """Euclidean length of each key, f32."""
    value_lengths: Float[Array, "L B T K"]
    """Of each value, f32. The first token often has a short value: it is read much, and
    adds little."""
    visible: Bool[np.ndarray, "L T"]
    """Whether the next token can read it: a layer with a window forgets."""


def cache_contents(
    config: ModelConfig,
    keys: Float[Array, "L B T K H"],
    values: Float[Array, "L B T K H"],
) -> CacheContents:
    """Returns what the cache holds of each token, by layer and key head.

    Args:
      keys: the site `k_rot`, which is what the cache stores.
      values: the site `v`.
    """

    def lengths(x: Array) -> Array:
        return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)

    visible = visible_tokens(config, keys.shape[2])
    return CacheContents(lengths(keys), lengths(values), visible)


def visible_tokens(config: ModelConfig, num_tokens: int) -> Bool[np.ndarray, "L T"]:
    """Returns whether the next token can read each: a layer with a window forgets."""
    kinds, age = layer_kinds(config), num_tokens - np.arange(num_tokens)
    window = config.window if config.window is not None else num_tokens + 1
    local = [kinds[i % len(kinds)].local for i in range(config.num_layers)]
    return np.stack([age < window if is_local else age > 0 for is_local in local])


def bytes_per_token(config: ModelConfig) -> int:
    """Returns `2 L K H` numbers in bytes: what each token of a row adds to the cache.

    In the compute dtype.
    """
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return numbers * jnp.dtype(compute_dtype(config.dtype)).itemsize


def read_mass(probs: Float[Array, "*L B N T S"]) -> Float[Array, "*L B N S"]:
    """Returns how much each key is read: its probability, summed over the queries.

    Args:
      probs: the site `attn_probs`.
    """
    return jnp.sum(probs, axis=-2)


def num_readers(config: ModelConfig, num_tokens: int) -> Int[np.ndarray, "L T"]:
    """Returns how many queries of a text can read each token, its own included."""
    after = num_tokens - np.arange(num_tokens)
    kinds, window = layer_kinds(config), config.window or num_tokens
    local = [kinds[i % len(kinds)].local for i in range(config.num_layers)]
    return np.stack([np.minimum(after, window) if one else after for one in local])
