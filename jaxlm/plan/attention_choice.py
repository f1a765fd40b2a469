"""Tells which attention implementation a model will take, before it runs."""

from jaxlm.config import ModelConfig
from jaxlm.ops.attention.dispatch import Choice, choose
from jaxlm.ops.attention.request import request_of_sizes
from jaxlm.ops.linear import compute_dtype
from jaxlm.sharding.rules import context_parts


def attention_choices(
    config: ModelConfig,
    batch: int,
    num_queries: int,
    cache_length: int | None = None,
    *,
    is_empty: bool = False,
    segments: bool = True,
) -> dict[str, Choice]:
    """Returns the choice for each kind of layer, `global` and `local`.

    It holds for the current mesh.

    Args:
      config: the model.
      batch: number of rows.
      num_queries: tokens computed at once in each row.
      cache_length: capacity of the cache; None without one, as in training.
      is_empty: whether nothing is in the cache yet, as when a prompt is read: then its
        tokens attend to one another alone.
      segments: whether rows have several documents; not with a cache.

    Raises:
      ValueError: when the implementation named in the config declines.
    """
    cached = cache_length is not None
    num_keys = num_queries if cache_length is None or is_empty else cache_length
    choices = {}
    for kind in dict.fromkeys(config.layer_pattern):
        request = request_of_sizes(
            batch=batch,
            num_queries=num_queries,
            num_keys=num_keys,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=compute_dtype(config.dtype),
            window=config.window if kind == "local" else None,
            soft_cap=config.attention_soft_cap,
            sinks=config.attention_sinks,
            segments=segments and not cached,
            query_positions=cached and not is_empty,
        )
        name = config.decode_attention if cached else config.attention
        devices = 1 if cached else context_parts()
        choices[kind] = choose(name, request, devices, config.context_attention)
    return choices
