"""The Transformer: one network for every choice in `ModelConfig`.

Read `forward` first, then `Transformer`, then `block.py`. Modules hold no state:
parameters go in as a nested dict, values come out. Formulas are in `jaxlm/ops`.
Letters of shapes are explained in `jaxlm/types.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlm.config import ModelConfig
from jaxlm.model.block import Block, Context, Norm, layer_kinds, weight_init
from jaxlm.model.kv_cache import Cache
from jaxlm.model.layers import run_layers
from jaxlm.model.positions import rotations
from jaxlm.ops.linear import compute_dtype, product
from jaxlm.ops.probe import SITES, Probe, Tap, check_taps
from jaxlm.ops.rope import sinusoids
from jaxlm.sharding.rules import activation as shard
from jaxlm.sharding.rules import batch_parts, lay_out
from jaxlm.types import Params, Trace


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What one call of the model returns."""

    # While JAX takes this tree apart and rebuilds it, a leaf may be anything: shapes
    # are given below, but not checked.
    logits: Any
    """[B, T, V] f32, after the final soft cap."""
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
    edits: Sequence[Any] = (),
) -> Output:
    """Logits of the token after each token. Pure: jit, grad and vmap apply.

    Args:
      config: static.
      params: as `init` makes them, f32 or any float dtype; `layers` may be a tuple
        with one tree for each layer, then `cache.layers` is one too.
      tokens: ids below `config.vocab_size`.
      positions: place of each token in its text; None counts from the start of the
        row, or from the end of the cache.
      segment_ids: attention stays inside a segment; None is one segment. Not with a
        cache.
      cache: earlier keys and values; the tokens are added to it. The caller makes
        sure that they fit (`generate` does).
      taps: sites to read.
      edits: sites to change; none can be changed yet, so it must be empty.

    Raises:
      ValueError: for taps that do not exist, edits, or segments with a cache.
    """
    model = Transformer(config)
    x, cache, trace = features(
        config,
        params,
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        taps=taps,
        edits=edits,
    )
    logits = model.apply({"params": params}, x, method="unembed")
    probe = Probe(taps)
    logits = probe("logits", logits)
    return Output(logits=logits, cache=cache, trace={**trace, **probe.values})


def features(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    taps: Sequence[Tap] = (),
    edits: Sequence[Any] = (),
) -> tuple[Float[Array, "B T D"], Cache | None, Trace]:
    """`forward` up to the output head: what `unembed` turns into logits."""
    if edits:
        raise ValueError("edits: the model can be read (taps) but not yet be changed")
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids: a cache holds one text in each row")
    check_taps(taps, config.num_layers, absent_sites(config))
    model = Transformer(config)
    return model.apply(
        {"params": params},
        jnp.asarray(tokens),
        positions,
        segment_ids,
        cache,
        tuple(taps),
        method="features",
    )


def unembed(
    config: ModelConfig, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Logits (f32) of what `features` returns."""
    return Transformer(config).apply({"params": params}, x, method="unembed")


def init(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Random parameters, f32, stacked over layers. Jit it to make them sharded.

    Raises:
      ValueError: when the vocabulary size is not set.
    """
    if not config.vocab_size:
        raise ValueError("model.vocab_size is 0: set it to the tokenizer's size")
    # Only shapes matter here; one row for each part into which a mesh cuts a batch.
    tokens = jnp.zeros((batch_parts(), 1), jnp.int32, out_sharding=shard("batch", None))
    # A kernel of another device could not even be traced here.
    config = replace(config, attention="reference")
    variables = Transformer(config).init(key, tokens, None, None, None, ())
    return variables["params"]


def absent_sites(config: ModelConfig) -> frozenset[str]:
    """Sites that this model does not have."""
    absent = set()
    if config.num_experts:
        absent |= {"mlp_pre", "mlp_gate", "mlp_act"}
    else:
        absent.add("router_logits")
    if not config.gated:
        absent.add("mlp_gate")
    if config.norm_placement == "output":
        absent |= {"attn_norm_scale", "mlp_norm_scale"}
    return frozenset(absent)


class Transformer(nn.Module):
    """Embedder, blocks, final norm, output head."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.embed = Embedder(config)
        if self.is_initializing():
            self.layers = self.param("layers", init_layers, config)
        else:
            self.layers = self.get_variable("params", "layers")
        if config.final_norm:
            self.final_norm = Norm(config, (config.model_dim,))
        if not config.tied_embeddings:
            self.lm_head = Head(config)

    def __call__(self, tokens, positions, segment_ids, cache, taps):
        x, cache, trace = self.features(tokens, positions, segment_ids, cache, taps)
        return self.unembed(x), cache, trace

    def features(self, tokens, positions, segment_ids, cache: Cache | None, taps):
        config = self.config
        query_index, lengths = None, None
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if cache is not None:
            lengths = cache.lengths
            query_index = lengths[:, None] + places
        if positions is None:
            positions = jnp.broadcast_to(places, tokens.shape)
            positions = positions if query_index is None else query_index
        rotation, local_rotation = rotations(config, positions)
        context = Context(rotation, local_rotation, segment_ids, query_index, lengths)

        probe = Probe(taps)
        tokens = probe("tokens", tokens)
        dtype = compute_dtype(config.dtype)
        x = probe("embed", self.embed.encode(tokens, positions, dtype))
        inner = [tap for tap in taps if not SITES[tap.site][1].startswith("*")]
        old = None if cache is None else cache.layers
        x, new, trace = run_layers(config, self.layers, x, context, old, inner)
        if config.final_norm:
            x = self.final_norm(x)
        x = probe("final_norm", x)
        if cache is not None:
            cache = Cache(layers=new, lengths=lengths + tokens.shape[1])
        return x, cache, {**trace, **probe.values}

    def unembed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        config = self.config
        head = self.embed.decode if config.tied_embeddings else self.lm_head
        logits = head(x)
        if config.final_soft_cap is not None:
            cap = config.final_soft_cap
            logits = cap * jnp.tanh(logits / cap)
        return logits


def init_layers(key: Key[Array, ""], config: ModelConfig) -> Params:
    """Parameters of all blocks, stacked: [L, ...]. All kinds have the same shapes."""
    rows, out = batch_parts(), shard("batch", None, None)
    x = jnp.zeros((rows, 1, config.model_dim), out_sharding=out)
    positions = jnp.zeros((rows, 1), jnp.int32, out_sharding=shard("batch", None))
    context = Context(*rotations(config, positions), None, None, None)
    block = Block(config, layer_kinds(config)[0], parent=None)

    def one(key):
        return block.init(key, x, context, None, Probe())["params"]

    return jax.vmap(one)(jax.random.split(key, config.num_layers))


class Embedder(nn.Module):
    """Token ids to vectors, and vectors to logits."""

    config: ModelConfig

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        self.table = self.param("table", normal, (c.vocab_size, c.model_dim))
        if c.position == "learned":
            shape = (c.context_length, c.model_dim)
            self.positions = self.param("positions", normal, shape)

    def encode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: Any
    ) -> Float[Array, "B T D"]:
        config = self.config
        out = shard("batch", None, None)
        # Rounded to the compute dtype first, as the published Gemma models do.
        scale = jnp.asarray(config.embedding_scale, dtype)
        # A lookup needs whole rows of the table on a device. Left to itself, the
        # compiler replicates far more, forward and backward.
        table = lay_out(self.table, "vocab", None)
        x = table.at[tokens].get(out_sharding=out)
        x = x.astype(dtype) * scale
        if config.position == "learned":
            table = lay_out(self.positions, None, None)
            x += table.at[positions].get(out_sharding=out).astype(dtype)
        elif config.position == "sinusoidal":
            x += sinusoids(positions, config.model_dim).astype(dtype)
        return x

    def decode(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits from the embedding table (tied head)."""
        out = shard("batch", None, "vocab")
        return product(
            "BTD,VD->BTV", x, self.table, out_sharding=out, out_dtype=jnp.float32
        )


class Head(nn.Module):
    """Vectors to logits by a matrix of its own (untied head)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        config = self.config
        init = weight_init(config, config.model_dim)
        if config.init == "fan_in":
            init = nn.initializers.zeros
        kernel = self.param("kernel", init, (config.model_dim, config.vocab_size))
        out = shard("batch", None, "vocab")
        return product(
            "BTD,DV->BTV", x, kernel, out_sharding=out, out_dtype=jnp.float32
        )
