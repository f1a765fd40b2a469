"""What is compiled to read prompts into a cache."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.infer.decoding.decoding_spec import DecodingSpec
from jaxlm.model.block import layer_kinds
from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import (
    Cache,
    LayerCache,
    LayerStacks,
    stack_layers,
    unstack_layers,
)
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.layout import layout
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import reshard
from jaxlm.types import Params, Trace

Layers = tuple[LayerCache, ...]
Probes = tuple[Sequence[Edit], Sequence[Tap]]
# Layers, logits of the rows that end in the chunk, hits of the edits, and the trace.
ReadChunk = tuple[Layers, Float[Array, "B V"], tuple[Any, ...], Trace]


def begin(
    spec: DecodingSpec,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    probes: Probes,
    room: int,
) -> ReadChunk:
    """Reads the first tokens of each row into a new cache.

    Args:
      lengths: of each row in all.
      room: tokens for which the cache has room.
    """
    start, ends = (reshard(x, "B") for x in (jnp.zeros_like(lengths), lengths))
    # What is carried from layer to layer has no more room than these tokens need.
    layers = _empty_layers(spec, len(lengths), min(tokens.shape[1], room))
    cache = Cache(layers, start, is_empty=True, ends=ends)
    none = jnp.zeros((len(lengths), spec.config.vocab_size), jnp.float32)
    layers, logits, hits, trace = _read(
        *(spec, params, tokens, lengths, cache, none, probes)
    )
    return _with_room(spec, layers, room), logits, hits, trace


def extend(
    spec: DecodingSpec,
    params: Params,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    layers: Layers,
    logits: Float[Array, "B V"],
    probes: Probes,
) -> ReadChunk:
    """Adds each row's tokens after the first `start`, up to `lengths` in all.

    The logits of a row that has ended before stay as they are.
    """
    start, ends = (reshard(x, "B") for x in (start, lengths))
    stacked = stack_layers(layers, len(layer_kinds(spec.config)))
    cache = Cache(stacked, start, ends=ends)
    return _read(spec, params, tokens, lengths, cache, logits, probes)


def grow(spec: DecodingSpec, layers: Layers) -> Layers:
    """Returns the layers of a cache with room for `spec.max_length` tokens."""
    return _with_room(spec, layers, spec.max_length)


def _with_room(spec: DecodingSpec, layers: Layers, room: int) -> Layers:
    rows, count = len(layers[0].keys), spec.config.num_layers
    larger = jax.eval_shape(
        lambda: unstack_layers(_empty_layers(spec, rows, room), count)
    )

    def longer(x, new):
        missing = max(new.shape[1] - x.shape[1], 0)
        return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))

    # The tokens stay where they are, also where a ring is new.
    leaves = map(longer, *map(jax.tree.leaves, (layers, larger)))
    return jax.tree.unflatten(jax.tree.structure(larger), leaves)


def take_rows(
    layers: Layers, logits: Float[Array, "B V"], numbers: Int[Array, " R"]
) -> tuple[Layers, Float[Array, "R V"]]:
    """Returns the rows with these numbers, in this order."""

    def chosen(x):
        return x.at[numbers].get(out_sharding=layout(x))

    return jax.tree.map(chosen, (layers, logits))


def _empty_layers(
    spec: DecodingSpec, num_rows: int, room: int
) -> LayerCache | LayerStacks | Layers:
    # What only holds prompts takes nothing back.
    size = {"kind": spec.kind, "spare": spec.spare if room == spec.max_length else 0}
    return init_cache(spec.config, num_rows, room, **size).layers


def _read(
    spec: DecodingSpec,
    params: Params,
    tokens: Array,
    lengths: Array,
    cache: Cache,
    logits: Float[Array, "B V"],
    probes: Probes,
) -> ReadChunk:
    config, (edits, taps) = spec.config, probes
    tokens, lengths = reshard(tokens, "B_"), reshard(lengths, "B")
    # Padding does not make a row longer: some rotations depend on its length.
    index = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    positions = jnp.minimum(index, lengths[:, None] - 1)
    # Only the last token of each prompt needs logits, unless they are tapped or edited.
    head = any(one.site == "logits" for one in (*edits, *taps))
    out = forward(
        *(config, params, tokens),
        positions=positions,
        cache=cache,
        taps=taps,
        edits=edits,
        head=head,
        block=spec.block,
    )
    assert out.cache is not None
    is_last = index == lengths[:, None] - 1

    def last(x: Array) -> Array:
        chosen = jnp.where(is_last[..., None], x, 0)
        return jnp.sum(chosen, axis=1, keepdims=True)

    if out.logits is None:
        new = unembed(config, params, last(out.hidden_states))
    else:
        new = last(out.logits)
    new = reshard(new[:, 0], "B_")[:, : config.vocab_size]
    ends = is_last.any(axis=1)[:, None]
    logits = jnp.where(ends, new, reshard(logits, "B_"))
    layers = unstack_layers(out.cache.layers, config.num_layers)
    return layers, logits, out.hits, out.trace
