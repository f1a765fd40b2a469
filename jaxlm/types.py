"""The values that travel, and the letters their shapes are written in.

B batch, T query tokens, S key (cached) tokens, D model, N query heads, K key/value
heads, G = N / K, H head dim, F hidden, V vocabulary, L layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

# Nested dict of arrays. The layout is the contract between model, checkpoints,
# sharding rules and optimizer masks; `docs/params.md` lists it.
Params = Mapping[str, Any]

# Probe site -> activations, with a leading axis of the layers that were tapped.
Trace = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is to be predicted from them. NumPy or jax arrays."""

    # While JAX takes this tree apart and rebuilds it, a leaf may be anything: shapes
    # are given below, but not checked.
    tokens: Any
    """[B, T] int32: inputs."""
    targets: Any
    """[B, T] int32: the token that follows each input."""
    positions: Any
    """[B, T] int32: position in the document, from 0 at its first token in the row."""
    segment_ids: Any
    """[B, T] int32: number of the document in the row, from 1; 0 marks padding."""
    loss_weights: Any
    """[B, T] f32: weight of each target in the loss; 0 where nothing is predicted."""
