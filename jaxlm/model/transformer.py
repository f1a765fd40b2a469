"""The Transformer: one network for every choice in `ModelConfig`.

Read `forward` first, then `block.py`, which has one layer (`layer_stack.py` runs all
of them). Parameters go in as a nested dict, values come out. Each weight is described
in `params.py`, formulas are in `jaxlm/ops`, and the letters of shapes are explained in
`jaxlm/types.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.model.block import Block, Norm
from jaxlm.model.checks import (
    as_tokens,
    check_config,
    check_layers,
    check_model,
    check_of_tokens,
)
from jaxlm.model.divisible import divisible_config, divisible_params, without_padding
from jaxlm.model.kv_cache import Cache
from jaxlm.model.layer_stack import ModelPart, run_layers
from jaxlm.model.params import param
from jaxlm.model.positions import Context, make_context
from jaxlm.model.recording import start_recording
from jaxlm.model.trace import complete
from jaxlm.ops.embedding import lookup
from jaxlm.ops.layout import layout
from jaxlm.ops.linear import compute_dtype, einsum
from jaxlm.ops.probing.edit import Edit, total_hits
from jaxlm.ops.probing.probe import Probe
from jaxlm.ops.probing.tap import Tap
from jaxlm.ops.rope import sinusoids
from jaxlm.sharding.rules import activation_spec, gather_stream, reshard
from jaxlm.types import Params

# Logit of an id that pads the vocabulary; sampling takes it for an id that is excluded.
NO_TOKEN = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """The result of one call of the model."""

    # `Any`: see `jaxlm/types.py` on leaves.
    hidden_states: Any
    """[B, T, D] in the compute dtype: the input of the output head; with `stop` the
    residual stream that enters that layer."""
    logits: Any
    """[B, T, V] f32, after the final soft cap; None with `head=False` or `stop`."""
    cache: Cache | None
    """The given cache with the new tokens; None without one that is kept."""
    trace: Mapping[str, Any]
    """A `Trace`: tapped sites; sites inside the layers have a leading layer axis."""
    hits: tuple[Any, ...]
    """How often each edit has fired, int32, for `check_hits`."""


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    taps: Sequence[Tap] = (),
    edits: Sequence[Edit] = (),
    head: bool = True,
    start: int | Int[Array, ""] = 0,
    stop: int | None = None,
    stream: Float[Array, "B T D"] | None = None,
    block: type[Block] = Block,
    zigzag: bool = False,
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
      cache: earlier keys and values, to which the tokens are added. Inside jit the
        caller ensures that they fit.
      taps: sites to read.
      edits: changes of sites, made in this order.
      head: False skips the output head, for callers that need the logits of some tokens
        only and call `unembed` themselves.
      start: the first layer to run, on `stream`. It may be traced: then one program
        serves all, without gradients and without taps inside the layers.
      stop: the layer to stop before; the result is then the residual stream that
        enters it, without the final norm and the head.
      stream: the residual stream that enters layer `start`, as the site `resid_pre` or
        `hidden_states` of a call with `stop`; the tokens are not embedded, and only
        their shape matters.
      block: what computes a layer; see `Block`.
      zigzag: all arrays [B, T], positions among them, are in the order that balances
        the work where mesh.context cuts rows, and so are the results; without edits.
        See `ops/attention/context_parallel.py`.

    Raises:
      ValueError: for arguments of the wrong type or shape, parameters of another model,
        layers that are not there, taps or edits that cannot be, a trace that does not
        fit into memory, segments with a cache, or rows that mesh.context does not cut
        into equal parts; outside jit also for ids outside the vocabulary, a cache
        without room, and an edit that changes nothing.
    """
    check_model(config, params, block)
    check_layers(config, params, start, stop, stream)
    tokens = as_tokens(config, tokens, cache)
    check_of_tokens("positions", positions, tokens.shape)
    check_of_tokens("segment_ids", segment_ids, tokens.shape)
    context = make_context(config, tokens, positions, segment_ids, cache, zigzag)
    part = ModelPart(start, stop, stream is not None, head)
    probe, recorder = start_recording(
        config, tokens, context, cache, taps, edits, part, block
    )
    # What runs on this mesh may have more key heads and a padded vocabulary.
    running = divisible_config(config, block)
    weights = divisible_params(running, params, block)
    # With a cache rows are whole on each device: one new token cannot be cut.
    rows = "BT" if cache is None else "B_"

    if stream is None:
        x = _embed(running, weights, reshard(tokens, rows), context, probe)
    else:
        x = reshard(stream.astype(compute_dtype(config.dtype)), f"{rows}D")
    x, cache, recorder = run_layers(
        running, weights["layers"], x, context, cache, recorder, probe, part, block
    )
    logits = None
    if stop is not None:
        x = gather_stream(x)
    else:
        x = probe("final_norm", gather_stream(_final_norm(running, weights, x, probe)))
        if head:
            logits = without_padding(unembed(running, weights, x), config.vocab_size)
            logits = probe("logits", logits)

    trace = complete(running, weights, taps, probe, recorder, context, cache, part)
    hits = total_hits(edits, recorder.hits, probe.hits)
    return Output(x, logits, cache, trace, hits)


class Embedder(nn.Module):
    """Embeds token ids, and adds learned or sinusoidal position embeddings."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], probe: Probe
    ) -> Float[Array, "B T D"]:
        config, dtype = self.config, compute_dtype(self.config.dtype)
        tokens = probe("tokens", tokens)
        x = lookup(param(self, "embed/table"), tokens, dtype)
        # The scale is rounded to the compute dtype, as the published Gemma models do.
        x *= jnp.asarray(config.embedding_scale, dtype)
        x = probe("embed", x)
        if config.position == "learned":
            table, placed = param(self, "embed/positions"), layout(tokens)
            if placed is not None:
                positions = jax.sharding.reshard(positions, placed)
            x += probe("pos_embed", lookup(table, positions, dtype))
        elif config.position == "sinusoidal":
            x += probe(
                "pos_embed", sinusoids(positions, config.model_dim).astype(dtype)
            )
        return x


def _embed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    context: Context,
    probe: Probe,
) -> Float[Array, "B T D"]:
    apply: Callable[..., Any] = Embedder(config, parent=None).apply
    return apply({"params": params["embed"]}, tokens, context.positions, probe)


def _final_norm(
    config: ModelConfig,
    params: Params,
    x: Float[Array, "*B D"],
    probe: Probe | None = None,
) -> Float[Array, "*B D"]:
    if not config.final_norm:
        return x
    norm: Callable[..., Any] = Norm(config, "final_norm", parent=None).apply
    return norm({"params": params["final_norm"]}, x, probe)


def head_params(config: ModelConfig, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` multiplies by.

    In the form that the mesh needs, so that no call of `unembed` makes it again: what
    has that form already stays as it is.
    """
    if config.tied_embeddings:
        part = {"embed": {"table": params["embed"]["table"]}}
    else:
        part = {"lm_head": params["lm_head"]}
    return divisible_params(divisible_config(config), part)


def unembed(
    config: ModelConfig,
    params: Params,
    x: Float[Array, "*B D"],
    *,
    norm: bool = False,
) -> Float[Array, "*B V"]:
    """Computes logits (f32) from hidden states, by the tied table or the head.

    Where mesh.tensor does not divide the vocabulary there are a few more logits than
    tokens, all `NO_TOKEN`.

    Args:
      x: with up to three leading axes, e.g. [B, T, D], or [L, B, T, D] from a tap.
      norm: apply the final norm first, as for values of the residual stream (a logit
        lens); `Output.hidden_states` is already normalized.
    """
    check_config(config)
    if norm:
        x = _final_norm(config, params, x)
    leading = "LBT"[4 - x.ndim :]
    head = head_params(config, params)
    if config.tied_embeddings:
        weight, w = "VD", head["embed"]["table"]
    else:
        weight, w = "DV", head["lm_head"]["kernel"]
    vocab, sharding = activation_spec("V"), layout(x)
    out = sharding and vocab and P(*sharding.spec[:-1], *vocab)
    equation = f"{leading}D,{weight}->{leading}V"
    logits = einsum(equation, x, w, out, jnp.float32)
    if config.final_soft_cap is not None:
        logits = config.final_soft_cap * jnp.tanh(logits / config.final_soft_cap)
    if logits.shape[-1] > config.vocab_size:
        ids = jax.lax.broadcasted_iota(
            jnp.int32, logits.shape, logits.ndim - 1, out_sharding=layout(logits)
        )
        logits = jnp.where(ids < config.vocab_size, logits, NO_TOKEN)
    return logits
