"""Which implementation of attention a model takes, known before it runs."""

from jaxlm.config import ModelConfig
from jaxlm.ops.attention.dispatch import Choice, choose
from jaxlm.ops.attention.request import request_of_sizes
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
    cached = cache_length is not None
    choices = {}
    for kind in dict.fromkeys(config.layer_pattern):
        request = request_of_sizes(
            batch=batch,
            num_queries=num_queries,
            num_keys=cache_length if cached else num_queries,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=compute_dtype(config.dtype),
            window=config.window if kind == "local" else None,
            soft_cap=config.attention_soft_cap,
            sinks=config.attention_sinks,
            segments=not cached,
            query_positions=cached,
        )
        name = config.decode_attention if cached else config.attention
        choices[kind] = choose(name, request)
    return choices
