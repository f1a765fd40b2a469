"""Which keys a query may attend to, as booleans."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


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
    distance = query_index[:, :, None] - key_index
    allowed = jnp.ones_like(distance, dtype=bool)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance < window
    if query_segments is not None:
        allowed &= query_segments[:, :, None] == key_segments[:, None, :]
    if key_length is not None:
        allowed &= key_index < key_length[:, None, None]
    return allowed
