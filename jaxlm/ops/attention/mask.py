"""Which keys a query may attend to, as booleans."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def may_attend(
    query_index: Any,
    key_index: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    query_segment: Any = None,
    key_segment: Any = None,
    key_length: Any = None,
) -> Any:
    """`attention_mask` for integers that broadcast to the shape of the scores.

    None where nothing is hidden. Kernels call it with a block's rows and columns.
    """
    parts = []
    if causal:
        parts.append(key_index <= query_index)
    if window is not None:
        parts.append(query_index - key_index < window)
    if query_segment is not None:
        parts.append(query_segment == key_segment)
    if key_length is not None:
        parts.append(key_index < key_length)
    allowed = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    return allowed


def attention_mask(
    query_index: Int[Array, "#B T"],
    key_index: Int[Array, " S"],
    *,
    causal: bool = True,
    window: int | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    key_length: Int[Array, " #B"] | None = None,
) -> Bool[Array, "#B T S"]:
    """True where query t may attend to key s.

    Args:
      query_index: place of each query in the row of keys.
      key_index: place of each key in its row.
      causal: keys after the query are hidden.
      window: keys `window` or more places before the query are hidden.
      query_segments, key_segments: both or none; other segments are hidden.
      key_length: keys from this place on are hidden.
    """
    segments = query_segments is not None and key_segments is not None
    allowed = may_attend(
        query_index[:, :, None],
        key_index,
        causal=causal,
        window=window,
        query_segment=query_segments[:, :, None] if segments else None,
        key_segment=key_segments[:, None, :] if segments else None,
        key_length=None if key_length is None else key_length[:, None, None],
    )
    everywhere = jnp.ones((*query_index.shape, key_index.shape[0]), bool)
    return everywhere if allowed is None else allowed & everywhere
