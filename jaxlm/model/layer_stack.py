"""Runs the stack of layers: in a scan over groups of them, or in a loop.

Stacked parameters `[L, ...]` are scanned, so compile time is that of one group. A
group is one period of the layer patterns; layers left over (Gemma 3 1B has 26 layers
and groups of 6) follow in a loop. A tuple of layers, as decoding uses, runs in a loop
throughout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxlm.config import ModelConfig
from jaxlm.model.block import Block, layer_kinds
from jaxlm.model.kv_cache import Cache, LayerStacks
from jaxlm.model.positions import Context
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.probe import Probe
from jaxlm.ops.probing.recorder import Recorder
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import context_parts, cut_stream, tensor_parts
from jaxlm.types import Params


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything except a layer's slice of the stacked weights, and gathers."""
    gathers = "all_gather", "linear_call"
    return primitive.name not in ("dynamic_slice", "squeeze", *gathers)


# Of kernels that never hold all scores; see `ops/attention/flash.py`.
_ATTENTION = ("attention_output", "attention_lse")
_BLOCK_INPUT = "block_input"
_POLICIES = jax.checkpoint_policies
_SAVE_ATTENTION = _POLICIES.save_only_these_names(*_ATTENTION)

REMAT_POLICIES = {
    "none": _all_but_weights,
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
    "attention": _SAVE_ATTENTION,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT, *_ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": None,
}


@dataclass(frozen=True)
class ModelPart:
    """What a call computes of the model."""

    start: Any = 0
    """The first layer, which may be traced."""
    stop: int | None = None
    """The layer to stop before; None runs all, and the final norm."""
    stream: bool = False
    """Whether it begins with a given residual stream, and embeds no tokens."""
    head: bool = True

    def unavailable(self) -> dict[str, str]:
        """Returns the sites that are not computed, and why."""
        sites = {} if self.head else {"logits": "with head=False"}
        if self.stop is not None:
            names = ("final_norm_div", "final_norm", "logits")
            sites |= dict.fromkeys(names, "with stop=")
        if self.stream:
            names = ("tokens", "embed", "pos_embed")
            sites |= dict.fromkeys(names, "with a given stream")
        return sites

    def layers(self, config: ModelConfig) -> range:
        """Returns those that may run."""
        first = self.start if isinstance(self.start, int) else 0
        return range(first, config.num_layers if self.stop is None else self.stop)


def run_layers(
    config: ModelConfig,
    layers: Params | tuple[Params, ...],
    x: Float[Array, "B T D"],
    context: Context,
    cache: Cache | None,
    recorder: Recorder,
    probe: Probe,
    part: ModelPart,
    block: type[Block],
) -> tuple[Float[Array, "B T D"], Cache | None, Recorder]:
    """Runs the blocks of a part of the model.

    Args:
      layers: stacked, or a tuple with one entry per layer, and so is the cache.
      recorder: of the sites that the probe taps inside the layers.
      probe: its taps and edits hold for each layer.
      block: what computes a layer.

    Returns:
      The residual stream, which may be cut (`gather_stream`), the cache with the new
      tokens if it is kept, and the recorder with the tapped values.

    Raises:
      ValueError: when the block changes the shape or dtype of the residual stream, or
        does not call its probe at a site that is tapped or edited.
    """
    taps = [tap for tap in probe.taps if not SITES[tap.site].outside_layers]
    if block is Block and _cuts_stream(config, x, context, taps, probe.edits):
        x = cut_stream(x)
    stacked = not isinstance(layers, tuple)
    blocks = [
        _checkpointed(block(config, kind, parent=None), taps, stacked)
        for kind in layer_kinds(config)
    ]
    period, caches = len(blocks), None if cache is None else cache.layers
    keeps = cache is not None and cache.is_kept

    def run(carry, first, kinds):
        """Runs layers of these kinds, by index, from number `first` on."""
        x, new_caches, recorder = carry
        for i, kind in enumerate(kinds):
            number = first + i
            params = layers if stacked else layers[number]
            old = _take_cache(new_caches if keeps else caches, kind, number)
            x, new, values, hits = blocks[kind](
                params, number, x, context, old, probe.edits
            )
            recorder = recorder.write(number, values, hits)
            if keeps:
                new_caches = _put_cache(new_caches, kind, number, new)
        return (x, new_caches, recorder), None

    start, stop = part.start, part.layers(config).stop
    carry = x, caches if keeps else None, recorder
    if isinstance(start, int):
        done = start
        if stacked:
            done += (stop - start) // period * period
            group = partial(run, kinds=[(start + i) % period for i in range(period)])
            firsts = jnp.arange(start, done, period)
            unroll = config.unroll_layers or len(firsts)
            carry, _ = jax.lax.scan(group, carry, firsts, unroll=unroll)
        carry, _ = run(carry, done, [number % period for number in range(done, stop)])
    else:
        assert stacked
        one_layer = [partial(run, kinds=[kind]) for kind in range(period)]

        def of_its_kind(number, carry):
            return jax.lax.switch(number % period, one_layer, carry, number)[0]

        carry = jax.lax.fori_loop(start, stop, of_its_kind, carry)
    x, caches, recorder = carry
    if cache is None or caches is None:
        return x, None, recorder
    return x, Cache(caches, cache.lengths + x.shape[1]), recorder


def _cuts_stream(
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
) -> bool:
    """Whether each device has its part of the tokens, see `model.sequence_parallel`.

    What reads or changes the residual stream finds whole rows, as do rows that do not
    divide into such parts.
    """
    if not config.sequence_parallel or tensor_parts() == 1:
        return False
    read = any("D" in SITES[tap.site].shape.split() for tap in taps)
    divides = x.shape[1] % (context_parts() * tensor_parts()) == 0
    return divides and context.lengths is None and not read and not edits


def _checkpointed(
    module: Block, taps: Sequence[Tap], scanned: bool
) -> Callable[..., Any]:
    """Returns a function that runs a layer, and keeps for gradients what `remat` says.

    It is `(layers, number, x, context, cache, edits) -> (x, cache, values, hits)`.
    `layers` is the stack if it is scanned, else one layer. The layer is sliced out of
    the stack inside the checkpoint, so the backward pass slices it again and keeps no
    copy of the weights. `values` are what the taps keep.
    """
    apply: Callable[..., Any] = module.apply

    def block(layers, number, x, context, cache, edits):
        params = _take(layers, number) if scanned else layers
        x = checkpoint_name(x, _BLOCK_INPUT)
        probe = Probe(taps, edits, context.positions, number)
        y, cache = apply({"params": params}, x, context, cache, probe)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"{type(module).__name__} turns x of {x.dtype}{list(x.shape)} into "
                f"{y.dtype}{list(y.shape)}: it must keep shape and dtype"
            )
        edited = [edit for edit in edits if not SITES[edit.site].outside_layers]
        for chosen, how in ((taps, "tapped"), (edited, "edited")):
            for site in {one.site for one in chosen} - probe.called:
                raise ValueError(
                    f"{type(module).__name__} does not record {site!r}, which is "
                    f"{how}: call probe({site!r}, x) in it"
                )
        return y, cache, probe.values, probe.hits

    # Inside a scan XLA cannot merge the recomputation with the original.
    policy = REMAT_POLICIES[module.config.remat]
    return jax.checkpoint(block, policy=policy, prevent_cse=not scanned)


def _take(layers: Any, number: Any) -> Any:
    """Returns one layer of a stacked tree or of a tuple; None for no tree."""
    if isinstance(layers, tuple):
        return layers[number]
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), layers
    )


def _take_cache(caches: Any, kind: int, number: Any) -> Any:
    """Returns the cache of a layer; `kind` is the index of its kind."""
    if isinstance(caches, LayerStacks):
        return _take(caches.stacks[kind], number // len(caches.stacks))
    return _take(caches, number)


def _put_cache(caches: Any, kind: int, number: Any, new: Any) -> Any:
    """Returns the caches with that of one layer replaced."""
    if isinstance(caches, tuple):
        return (*caches[:number], new, *caches[number + 1 :])
    if isinstance(caches, LayerStacks):
        stacks = caches.stacks
        changed = _put_cache(stacks[kind], 0, number // len(stacks), new)
        return LayerStacks((*stacks[:kind], changed, *stacks[kind + 1 :]))
    layers = caches
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, number, 0), layers, new
    )
