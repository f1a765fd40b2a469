"""The Transformer: one network for every choice in `ModelConfig`.

Read `forward` first, then `block.py`. Parameters go in as a nested dict, values come
out. Each weight is described in `params.py`, formulas are in `jaxlm/ops`, and the
letters of shapes are explained in `jaxlm/types.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model import trace
from jaxlm.model.block import Context, Norm
from jaxlm.model.kv_cache import Cache
from jaxlm.model.layers import run_layers
from jaxlm.model.params import param
from jaxlm.model.positions import rotations
from jaxlm.ops.linear import compute_dtype, einsum
from jaxlm.ops.probe import Probe, Tap
from jaxlm.ops.rope import sinusoids
from jaxlm.sharding.rules import activation_spec, reshard
from jaxlm.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """The result of one call of the model."""

    # `Any`: see `jaxlm/types.py` on leaves.
    hidden_states: Any
    """[B, T, D] in the compute dtype: the input of the output head."""
    logits: Any
    """[B, T, V] f32, after the final soft cap; None with `head=False`."""
    cache: Cache | None
    """The given cache with the new tokens; None when none was given."""
    trace: Mapping[str, Any]
    """A `Trace`: tapped sites; sites inside the layers have a leading layer axis."""


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    taps: Sequence[Tap] = (),
    head: bool = True,
) -> Output:
    """Computes next-token logits at every position. Pure: jit, grad and vmap apply.

    Args:
      config: static.
      params: as `init` makes them, in any float dtype; `layers` may be a tuple of
        per-layer trees, and `cache.layers` must then be a tuple too.
      tokens: ids below `config.vocab_size`.
      positions: position of each token in its text; None counts from the start of the
        row, or from the end of the cache.
      segment_ids: attention stays inside a segment; None means one segment. Not with
        a cache.
      cache: earlier keys and values, to which the tokens are added. The caller ensures
        that they fit.
      taps: sites to read.
      head: False skips the output head, for callers that need the logits of some tokens
        only and call `unembed` themselves.

    Raises:
      ValueError: for taps that do not exist, `logits` with `head=False`, or segments
        with a cache.
    """
    if not head and any(tap.site == "logits" for tap in taps):
        raise ValueError("site 'logits' cannot be tapped with head=False")
    tokens = jnp.asarray(tokens)
    positions, context = _context(config, tokens, positions, segment_ids, cache)
    probe, recorder = Probe(taps), trace.empty_recorder(config, tokens, taps)

    embed: Callable[..., Any] = Embedder(config, parent=None).apply
    x = embed({"params": params["embed"]}, tokens, positions, probe)
    caches = None if cache is None else cache.layers
    x, caches, recorder = run_layers(
        config, params["layers"], x, context, caches, recorder
    )
    if config.final_norm:
        norm: Callable[..., Any] = Norm(config, "final_norm", parent=None).apply
        x = norm({"params": params["final_norm"]}, x)
    x = probe("final_norm", x)
    logits = probe("logits", unembed(config, params, x)) if head else None

    tapped = trace.complete(
        config, params, taps, recorder, probe.values, context, caches
    )
    if cache is not None:
        assert caches is not None
        cache = Cache(layers=caches, lengths=cache.lengths + tokens.shape[1])
    return Output(x, logits, cache, tapped)


class Embedder(nn.Module):
    """Embeds token ids, and adds learned or sinusoidal position embeddings."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], probe: Probe
    ) -> Float[Array, "B T D"]:
        config, dtype = self.config, compute_dtype(self.config.dtype)
        # A lookup needs whole rows of the table on each device. Left alone, the
        # compiler replicates far more, forward and backward.
        table = reshard(param(self, "embed/table"), "VD")
        x = table.at[probe("tokens", tokens)].get(out_sharding=activation_spec("BTD"))
        # The scale is rounded to the compute dtype, as the published Gemma models do.
        x = x.astype(dtype) * jnp.asarray(config.embedding_scale, dtype)
        x = probe("embed", x)
        if config.position == "learned":
            table = reshard(param(self, "embed/positions"), "CD")
            learned = table.at[positions].get(out_sharding=activation_spec("BTD"))
            x += probe("pos_embed", learned.astype(dtype))
        elif config.position == "sinusoidal":
            x += probe(
                "pos_embed", sinusoids(positions, config.model_dim).astype(dtype)
            )
        return x


def unembed(
    config: ModelConfig, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Computes logits (f32) from hidden states, by the tied table or the head."""
    if config.tied_embeddings:
        equation, w = "BTD,VD->BTV", params["embed"]["table"]
    else:
        equation, w = "BTD,DV->BTV", params["lm_head"]["kernel"]
    logits = einsum(equation, x, w, activation_spec("BTV"), jnp.float32)
    if config.final_soft_cap is not None:
        logits = config.final_soft_cap * jnp.tanh(logits / config.final_soft_cap)
    return logits


def _context(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache | None,
) -> tuple[Int[Array, "B T"], Context]:
    """Returns the positions of the tokens, and what the layers share."""
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids: a cache holds one text in each row")
    query_positions, lengths = None, None
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    default: Array = jnp.broadcast_to(index, tokens.shape)
    if cache is not None:
        lengths = cache.lengths
        default = query_positions = lengths[:, None] + index
    if positions is None:
        positions = default
    rotation, local_rotation = rotations(config, positions)
    return positions, Context(
        rotation, local_rotation, segment_ids, query_positions, lengths
    )
