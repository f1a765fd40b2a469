"""Runs the blocks: in a scan over groups of layers, or in a loop.

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
from jaxlm.model.block import Block, Context, layer_kinds
from jaxlm.model.kv_cache import LayerCache, LayerStacks
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.probe import Probe
from jaxlm.ops.probing.recorder import Recorder
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params

Caches = LayerCache | LayerStacks | tuple[LayerCache, ...] | None


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything except a layer's slice of the stacked weights, and gathers."""
    return primitive.name not in ("dynamic_slice", "squeeze", "all_gather")


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
class Part:
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
    caches: Caches,
    recorder: Recorder,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
    block: type[Block],
    start: Any,
    stop: int,
    keep_caches: bool,
) -> tuple[Float[Array, "B T D"], Caches, Recorder]:
    """Runs the blocks from number `start`, which may be traced, to before `stop`.

    Args:
      layers, caches: both stacked, or both a tuple with one entry per layer. Caches may
        be None.
      recorder: of these taps and edits.
      taps: what to record inside the layers.
      block: what computes a layer.
      keep_caches: False returns no caches, and carries none from layer to layer.

    Returns:
      The residual stream, the new caches, and the recorder with the tapped values.

    Raises:
      ValueError: when the block changes the shape or dtype of the residual stream, or
        does not call its probe at a site that is tapped or edited.
    """
    stacked = not isinstance(layers, tuple)
    kinds = layer_kinds(config)
    modules = [block(config, kind, parent=None) for kind in kinds]
    blocks = [_block(module, taps, stacked) for module in modules]
    period = len(blocks)

    def run(place, number, carry):
        """Runs a layer, of which `place` is the number modulo the period."""
        x, new_caches, recorder = carry
        given = layers if stacked else layers[number]
        cache = _take_cache(new_caches if keep_caches else caches, place, number)
        x, cache, values, hits = blocks[place](given, number, x, context, cache, edits)
        recorder = recorder.write(number, values, hits)
        if keep_caches:
            new_caches = _put_cache(new_caches, place, number, cache)
        return x, new_caches if keep_caches else None, recorder

    carry, done = (x, caches if keep_caches else None, recorder), start
    if not isinstance(start, int):
        assert stacked

        def any_layer(number, carry):
            kinds = [partial(run, place) for place in range(period)]
            return jax.lax.switch(number % period, kinds, number, carry)

        return jax.lax.fori_loop(start, stop, any_layer, carry)

    def group(carry, first, size):
        """Runs `size` layers from number `first` on, which is traced in a scan."""
        for i in range(size):
            carry = run((start + i) % period, first + i, carry)
        return carry, None

    if stacked:
        done += (stop - start) // period * period
        firsts = jnp.arange(start, done, period)
        unroll = config.unroll_layers or len(firsts)
        one_group = partial(group, size=period)
        carry, _ = jax.lax.scan(one_group, carry, firsts, unroll=unroll)
    carry, _ = group(carry, done, stop - done)
    return carry


def _block(module: Block, taps: Sequence[Tap], scanned: bool) -> Callable[..., Any]:
    """Returns `(layers, number, x, context, cache, edits) -> (x, cache, values, hits)`.

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


def _take_cache(caches: Any, place: int, number: Any) -> Any:
    """Returns the cache of a layer; `place` is its number modulo the period."""
    if isinstance(caches, LayerStacks):
        return _take(caches.stacks[place], number // len(caches.stacks))
    return _take(caches, number)


def _put_cache(caches: Any, place: int, number: Any, new: Any) -> Any:
    """Returns the caches with that of one layer replaced."""
    if isinstance(caches, tuple):
        return (*caches[:number], new, *caches[number + 1 :])
    if isinstance(caches, LayerStacks):
        stacks = caches.stacks
        changed = _put_cache(stacks[place], 0, number // len(stacks), new)
        return LayerStacks((*stacks[:place], changed, *stacks[place + 1 :]))
    layers = caches
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, number, 0), layers, new
    )
