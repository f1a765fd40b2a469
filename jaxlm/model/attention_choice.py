"""Which implementation of attention a model takes, known before it runs."""

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.ops.attention.dispatch import Choice, choose
from jaxlm.ops.attention.request import request
from jaxlm.ops.attention.spec import AttentionSpec
from jaxlm.ops.linear import compute_dtype


def attention_choices(
    config: ModelConfig,
    batch: int,
    num_queries: int,
    cache_length: int | None = None,
) -> dict[str, Choice]:
    """The choice for each kind of layer (`global`, `local`), on the mesh in use.

    Args:
      config: the model.
      batch: rows.
      num_queries: tokens of a row that are computed at once.
      cache_length: tokens that the cache holds; None without one, as in training.

    Raises:
      ValueError: when the implementation that the config names cannot do it.
    """
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    cached = cache_length is not None
    S = cache_length if cached else num_queries
    dtype = compute_dtype(config.dtype)
    name = config.decode_attention if cached else config.attention
    ids = jax.ShapeDtypeStruct((batch, num_queries), jnp.int32)
    choices = {}
    for kind in dict.fromkeys(config.layer_pattern):
        asked = request(
            jax.ShapeDtypeStruct((batch, num_queries, N, H), dtype),
            jax.ShapeDtypeStruct((batch, S, K, H), dtype),
            AttentionSpec(
                scale=config.attention_scale or H**-0.5,
                window=config.window if kind == "local" else None,
                soft_cap=config.attention_soft_cap,
                sinks=jax.ShapeDtypeStruct((N,), jnp.float32)
                if config.attention_sinks
                else None,
                query_segments=None if cached else ids,
                key_segments=None if cached else ids,
                query_index=ids if cached else None,
            ),
        )
        choices[kind] = choose(name, asked)
    return choices
