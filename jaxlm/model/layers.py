"""Running the blocks one after the other: scanned over groups, or in a loop.

Stacked parameters `[L, ...]` are scanned, so that a program compiles in the time of one
group of layers. A group is one period of the layer patterns; layers that fill no whole
group (Gemma 3 1B has 26, in groups of 6) follow one by one. A tuple of layers, as
decoding uses, runs in a plain loop.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxlm.config import ModelConfig
from jaxlm.model.block import Block, Context, LayerKind, layer_kinds
from jaxlm.model.kv_cache import LayerCache
from jaxlm.ops.layout import layout, reshape
from jaxlm.ops.probe import Probe, Tap
from jaxlm.types import Params

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Caches = LayerCache | tuple[LayerCache, ...] | None


def run_layers(
    config: ModelConfig,
    layers: Params | tuple[Params, ...],
    x: Float[Array, "B T D"],
    context: Context,
    cache: Caches,
    taps: Sequence[Tap],
) -> tuple[Float[Array, "B T D"], Caches, dict[str, Array]]:
    """All blocks.

    Args:
      layers, cache: both stacked, or both a tuple with one entry for each layer.
      taps: sites inside the layers.

    Returns:
      The residual stream, the new cache, and for each tap [layers tapped, ...].
    """
    run = _Run(config, context, taps)
    stacked = not isinstance(layers, tuple)
    if stacked:
        first = jax.tree.map(itemgetter(0), (layers, cache))
    else:
        first = (layers[0], None if cache is None else cache[0])
    carry = (x, run.buffers(x, *first))
    advance = _scan if stacked else _loop
    (x, buffers), cache = advance(run, carry, layers, cache)
    return x, cache, run.read(buffers)


class _Run:
    """What every layer of one pass shares: the block, and where tapped values go."""

    def __init__(self, config: ModelConfig, context: Context, taps: Sequence[Tap]):
        self.num_layers = config.num_layers
        self.unroll = config.unroll_layers
        self.kinds = layer_kinds(config)
        self._block = _block(config, context, taps)
        self._taps = taps
        self._slots = {tap.site: _slots(tap, config.num_layers) for tap in taps}

    def layer(self, carry, number, kind: LayerKind, params, cache):
        """One block on (x, buffers); `number` of the layer may be traced."""
        x, buffers = carry
        x, cache, values = self._block(x, kind, params, cache)
        buffers = {
            site: jax.lax.dynamic_update_index_in_dim(
                buffer, values[site], jnp.asarray(self._slots[site])[number], 0
            )
            for site, buffer in buffers.items()
        }
        return (x, buffers), cache

    def buffers(self, x, params, cache) -> dict[str, Array]:
        """Zeros for the tapped values, and one more place for layers not selected."""
        if not self._taps:
            return {}
        _, _, values = jax.eval_shape(
            lambda *a: self._block(a[0], self.kinds[0], *a[1:]), x, params, cache
        )
        missing = [tap.site for tap in self._taps if tap.site not in values]
        assert not missing, missing

        def zeros(tap: Tap) -> Array:
            value = values[tap.site]
            places = self.num_layers if tap.layers is None else len(tap.layers) + 1
            cut = None if layout(value) is None else P(None, *value.sharding.spec)
            return jnp.zeros((places, *value.shape), value.dtype, out_sharding=cut)

        return {tap.site: zeros(tap) for tap in self._taps}

    def read(self, buffers: dict[str, Array]) -> dict[str, Array]:
        """The tapped values: buffers without the place for layers not selected."""
        return {
            tap.site: buffers[tap.site]
            if tap.layers is None
            else buffers[tap.site][: len(tap.layers)]
            for tap in self._taps
        }


def _loop(run: _Run, carry, layers, caches, first=0):
    """Layers one by one, from number `first` on; `layers` and `caches` are tuples."""
    new = []
    for i, params in enumerate(layers):
        kind = run.kinds[i % len(run.kinds)]
        old = None if caches is None else caches[i]
        carry, cache = run.layer(carry, first + i, kind, params, old)
        new.append(cache)
    return carry, None if caches is None else tuple(new)


def _scan(run: _Run, carry, layers, caches):
    """Stacked layers: a scan over whole groups, then the rest one by one."""
    period = len(run.kinds)
    groups = run.num_layers // period
    whole = groups * period

    def group(carry, inputs):
        first, layers, caches = inputs
        places = range(period)
        layers, caches = _pick(layers, places), _pick(caches, places)
        carry, new = _loop(run, carry, layers, caches, first)
        return carry, None if new is None else _stack(new)

    def split(v: Array) -> Array:
        shape = (groups, period, *v.shape[1:])
        return reshape(v[:whole], shape, (None, None, *range(1, v.ndim)))

    def join(v: Array) -> Array:
        return reshape(v, (whole, *v.shape[2:]), (None, *range(2, v.ndim)))

    inputs = (jnp.arange(0, whole, period), *jax.tree.map(split, (layers, caches)))
    carry, new = jax.lax.scan(group, carry, inputs, unroll=run.unroll or groups)
    new = jax.tree.map(join, new)
    if whole < run.num_layers:
        rest = range(whole, run.num_layers)
        layers, caches = _pick(layers, rest), _pick(caches, rest)
        carry, more = _loop(run, carry, layers, caches, whole)
        if more is not None:
            new = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, _stack(more))
    return carry, new


def _block(config: ModelConfig, context: Context, taps: Sequence[Tap]) -> Callable:
    """`(x, kind, params, cache) -> (x, cache, tapped values)`, with remat."""

    def block(x, kind: LayerKind, params, cache):
        probe = Probe(taps)
        module = Block(config, kind, parent=None)
        x, cache = module.apply({"params": params}, x, context, cache, probe)
        return x, cache, probe.values

    if config.remat == "none":
        return block
    # A scan cannot merge the two computations of a block, so nothing needs to keep
    # the compiler from it.
    return jax.checkpoint(
        block,
        policy=REMAT_POLICIES[config.remat],
        prevent_cse=False,
        static_argnums=(1,),
    )


def _slots(tap: Tap, num_layers: int) -> np.ndarray:
    """For each layer its place in the tap's buffer; the last place takes the others."""
    layers = range(num_layers) if tap.layers is None else tap.layers
    slots = np.full(num_layers, len(layers))
    slots[list(layers)] = np.arange(len(layers))
    return slots


def _pick(tree: Any, places: Sequence[int]) -> tuple[Any, ...] | None:
    """The entries `places` of a stacked tree, as trees."""
    if tree is None:
        return None
    return tuple(jax.tree.map(itemgetter(i), tree) for i in places)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
