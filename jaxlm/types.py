"""The values that travel, and the letters their shapes are written in.

B batch, T query tokens, S key (cached) tokens, D model, N query heads, K key/value
heads, G = N / K, H head dim, F hidden, V vocabulary, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

# Nested dict of arrays. The layout is the contract between model, checkpoints,
# sharding rules and optimizer masks; `docs/params.md` lists it.
Params = Mapping[str, Any]

# Probe site -> activations, with a leading axis of the layers that were tapped.
Trace = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is to be predicted from them. NumPy or jax arrays."""

    tokens: Int[Any, "B T"]
    """Inputs, int32."""
    targets: Int[Any, "B T"]
    """The token that follows each input, int32."""
    positions: Int[Any, "B T"]
    """Position in the document, from 0 at each document's first token in the row."""
    segment_ids: Int[Any, "B T"]
    """Number of the document in the row, from 1; 0 marks padding."""
    loss_weights: Float[Any, "B T"]
    """Weight of each target in the loss, f32; 0 where there is nothing to predict."""
