"""Where the tokens of a call stand: their positions, rotary angles and segments."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.kv_cache import Cache
from jaxlm.ops import rope

Rotation = tuple[Float[Array, "B T P"], Float[Array, "B T P"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What all layers of one call share."""

    positions: Int[Array, "B T"]
    """Position of each token in its text."""
    rotation: Rotation | None
    """cos and sin of global layers; None without RoPE."""
    local_rotation: Rotation | None
    """The same of local layers."""
    segment_ids: Int[Array, "B T"] | None
    query_positions: Int[Array, "B T"] | None
    """Index of each token in the cache; None without a cache, or with an empty one."""
    lengths: Int[Array, " B"] | None
    """Tokens already in the cache."""
    ends: Int[Array, " B"] | None = None
    """As `Cache.ends`."""
    zigzag: bool = field(default=False, metadata={"static": True})
    """Whether the tokens are in zigzag order (`ops/attention/context_parallel.py`)."""


def make_context(
    config: ModelConfig,
    tokens: Int[Array, "B T"] | jax.ShapeDtypeStruct,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    zigzag: bool = False,
) -> Context:
    """Returns what the layers share.

    Arguments as in `forward`; of the tokens only the shape matters.

    Raises:
      ValueError: for segments with a cache.
    """
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids: a cache holds one text in each row")
    assert not zigzag or positions is not None
    query_positions, lengths, ends = None, None, None
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    default: Array = jnp.broadcast_to(index, tokens.shape)
    if cache is not None:
        lengths, ends = cache.lengths, cache.ends
        default = lengths[:, None] + index
        query_positions = None if cache.is_empty else default
    if positions is None:
        positions = default
    rotation, local_rotation = rotations(config, positions)
    return Context(
        positions=positions,
        rotation=rotation,
        local_rotation=local_rotation,
        segment_ids=segment_ids,
        query_positions=query_positions,
        lengths=lengths,
        ends=ends,
        zigzag=zigzag,
    )


def rotations(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Rotation | None, Rotation | None]:
    """Returns cos and sin for global and for local layers; None, None without RoPE."""
    if config.position != "rope":
        return None, None
    frequencies, factor = _frequencies(config, positions)
    rotation = rope.rotation(positions, frequencies, factor)
    if config.rope_local_theta is None:
        return rotation, rotation
    local = rope.frequencies(config.rotary_dim, config.rope_local_theta)
    return rotation, rope.rotation(positions, local)


def max_fixed_rotation_length(config: ModelConfig) -> int | None:
    """Returns the longest row whose rotations do not depend on its length.

    None if they do not at any length: without dynamic or LongRoPE scaling.
    """
    scaling = config.rope_scaling
    if config.position != "rope" or scaling is None:
        return None
    if scaling.kind not in ("dynamic", "longrope"):
        return None
    return scaling.original_context_length or config.context_length


def _frequencies(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[np.ndarray, " P"] | Float[Array, "B P"], float]:
    """Returns the frequencies of global layers, and a factor for cos and sin."""
    dim, theta, scaling = config.rotary_dim, config.rope_theta, config.rope_scaling
    base = rope.frequencies(dim, theta)
    if scaling is None:
        return base, 1.0
    factor = scaling.factor
    original = scaling.original_context_length or config.context_length
    if scaling.kind == "linear":
        return base / factor, 1.0
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        stretched = rope.llama3_frequencies(
            base, factor=factor, low=low, high=high, original=original
        )
        return stretched, 1.0
    if scaling.kind == "yarn":
        stretched = rope.yarn_frequencies(
            dim,
            theta,
            factor=factor,
            original=original,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            truncate=scaling.truncate,
        )
        return stretched, scaling.attention_factor or rope.yarn_attention_factor(factor)
    # Dynamic and LongRoPE depend on the current length of each row.
    length = positions.max(axis=1) + 1
    if scaling.kind == "dynamic":
        stretched = rope.dynamic_frequencies(
            dim, theta, factor=factor, original=original, length=length
        )
        return stretched, 1.0
    assert scaling.kind == "longrope", scaling.kind
    stretched = rope.longrope_frequencies(
        base,
        scaling.short_factors,
        scaling.long_factors,
        original=original,
        length=length,
    )
    extension = factor if factor > 1 else config.context_length / original
    default = rope.longrope_attention_factor(extension, original)
    return stretched, scaling.attention_factor or default
