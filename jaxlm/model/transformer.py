"""The Transformer: one network for every choice in `ModelConfig`.

Read `forward` first, then `block.py`. Parameters go in as a nested dict, values come
out. Each weight is described in `params.py`, formulas are in `jaxlm/ops`, and the
letters of shapes are explained in `jaxlm/types.py`.
"""

from collections.abc import Mapping, Sequence
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
from jaxlm.model.params import apply, param, sizes
from jaxlm.model.positions import rotations
from jaxlm.ops.linear import compute_dtype, einsum
from jaxlm.ops.probe import Probe, Recorder, Tap, check_taps
from jaxlm.ops.rope import sinusoids
from jaxlm.sharding.rules import activation, lay_out
from jaxlm.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What one call of the model returns."""

    # `Any`: see `jaxlm/types.py` on leaves.
    hidden_states: Any
    """[B, T, D] in the compute dtype: what `unembed` turns into logits."""
    logits: Any
    """[B, T, V] f32, after the final soft cap; None with `head=False`."""
    cache: Cache | None
    """The cache that was given, with the new tokens; None when none was given."""
    trace: Mapping[str, Any]
    """A `Trace`: tapped sites; those of layers have a leading axis of the layers."""


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
    """Logits of the token after each token. Pure: jit, grad and vmap apply.

    Args:
      config: static.
      params: as `init` makes them, f32 or any float dtype; `layers` may be a tuple
        with one tree for each layer, then `cache.layers` is one too.
      tokens: ids below `config.vocab_size`.
      positions: position of each token in its text; None counts from the start of the
        row, or from the end of the cache.
      segment_ids: attention stays inside a segment; None is one segment. Not with a
        cache.
      cache: earlier keys and values; the tokens are added to it. The caller makes
        sure that they fit (`generate` does).
      taps: sites to read.
      head: False leaves out the output head, for callers that need the logits of some
        tokens only and call `unembed` themselves.

    Raises:
      ValueError: for taps that do not exist, or segments with a cache.
    """
    tokens = jnp.asarray(tokens)
    positions, context = _context(config, tokens, positions, segment_ids, cache, taps)
    probe, recorder = Probe(taps), _recorder(config, tokens, context.taps)

    embedder = Embedder(config, parent=None)
    x = apply(embedder, params["embed"], tokens, positions, probe)
    layers = None if cache is None else cache.layers
    x, layers, recorder = run_layers(
        config, params["layers"], x, context, layers, recorder
    )
    if config.final_norm:
        norm = Norm(config, "final_norm", parent=None)
        x = apply(norm, params["final_norm"], x)
    x = probe("final_norm", x)
    logits = probe("logits", unembed(config, params, x)) if head else None

    found = {**recorder.read(), **probe.values}
    found = trace.complete(config, params, taps, found, context, layers)
    if cache is not None:
        assert layers is not None
        cache = Cache(layers=layers, lengths=cache.lengths + tokens.shape[1])
    return Output(x, logits, cache, found)


class Embedder(nn.Module):
    """Token ids, and where the model learns them positions, to vectors."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], probe: Probe
    ) -> Float[Array, "B T D"]:
        config, dtype = self.config, compute_dtype(self.config.dtype)
        # A lookup needs whole rows of the table on a device. Left to itself, the
        # compiler replicates far more, forward and backward.
        table = lay_out(param(self, "embed/table"), "VD")
        x = table.at[probe("tokens", tokens)].get(out_sharding=activation("BTD"))
        # The scale is rounded to the compute dtype, as the published Gemma models do.
        x = x.astype(dtype) * jnp.asarray(config.embedding_scale, dtype)
        x = probe("embed", x)
        if config.position == "learned":
            table = lay_out(param(self, "embed/positions"), "CD")
            learned = table.at[positions].get(out_sharding=activation("BTD"))
            x += probe("pos_embed", learned.astype(dtype))
        elif config.position == "sinusoidal":
            x += probe(
                "pos_embed", sinusoids(positions, config.model_dim).astype(dtype)
            )
        return x


def unembed(
    config: ModelConfig, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Logits (f32) of hidden states, by the embedding table or a matrix of its own."""
    if config.tied_embeddings:
        equation, w = "BTD,VD->BTV", params["embed"]["table"]
    else:
        equation, w = "BTD,DV->BTV", params["lm_head"]["kernel"]
    logits = einsum(equation, x, w, activation("BTV"), jnp.float32)
    if config.final_soft_cap is not None:
        logits = config.final_soft_cap * jnp.tanh(logits / config.final_soft_cap)
    return logits


def _context(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache | None,
    taps: Sequence[Tap],
) -> tuple[Int[Array, "B T"], Context]:
    """Positions of the tokens, and what the layers share."""
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids: a cache holds one text in each row")
    check_taps(taps, config.num_layers, trace.absent_sites(config))
    query_positions, lengths = None, None
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    default: Array = jnp.broadcast_to(index, tokens.shape)
    if cache is not None:
        lengths = cache.lengths
        default = query_positions = lengths[:, None] + index
    if positions is None:
        positions = default
    on_the_way = trace.taps_on_the_way(config, taps)
    rotation, local_rotation = rotations(config, positions)
    return positions, Context(
        rotation, local_rotation, segment_ids, query_positions, lengths, on_the_way
    )


def _recorder(
    config: ModelConfig, tokens: Int[Array, "B T"], taps: Sequence[Tap]
) -> Recorder:
    """Slots for the sites inside the layers."""
    B, T = tokens.shape
    return Recorder.empty(
        taps,
        config.num_layers,
        {**sizes(config), "B": B, "T": T},
        compute_dtype(config.dtype),
        activation,
    )
