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
from jaxlm.model.cache import LayerCache
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
    block = _block(config, context, taps)
    kinds = layer_kinds(config)
    stacked = not isinstance(layers, tuple)
    slots = {tap.site: _slots(tap, config.num_layers) for tap in taps}

    def step(carry, layer, kind, params, layer_cache):
        """One block; `layer` is its number, traced inside a scan."""
        x, buffers = carry
        x, layer_cache, values = block(x, kind, params, layer_cache)
        buffers = {
            site: jax.lax.dynamic_update_index_in_dim(
                buffer, values[site], jnp.asarray(slots[site])[layer], 0
            )
            for site, buffer in buffers.items()
        }
        return (x, buffers), layer_cache

    def steps(carry, first, layers, caches):
        """Some blocks in a loop; `layers` and `caches` are tuples."""
        new = []
        for i, params in enumerate(layers):
            kind = kinds[i % len(kinds)]
            old = None if caches is None else caches[i]
            carry, layer_cache = step(carry, first + i, kind, params, old)
            new.append(layer_cache)
        return carry, None if caches is None else tuple(new)

    def pick(tree, places):
        """The entries `places` of stacked trees, as a tuple of trees."""
        if tree is None:
            return None
        return tuple(jax.tree.map(itemgetter(i), tree) for i in places)

    if stacked:
        one = jax.tree.map(itemgetter(0), (layers, cache))
    else:
        one = (layers[0], None if cache is None else cache[0])
    carry = (x, _buffers(block, taps, slots, x, kinds[0], *one))
    if not stacked:
        (x, buffers), cache = steps(carry, 0, layers, cache)
        return x, cache, _read(buffers, taps)

    period = len(kinds)
    groups = config.num_layers // period
    whole = groups * period

    def group(carry, inputs):
        first, layers, caches = inputs
        places = range(period)
        carry, new = steps(carry, first, pick(layers, places), pick(caches, places))
        return carry, None if new is None else _stack(new)

    grouped = jax.tree.map(
        lambda v: reshape(
            v[:whole], (groups, period, *v.shape[1:]), (None, None, *range(1, v.ndim))
        ),
        (layers, cache),
    )
    inputs = (jnp.arange(0, whole, period), *grouped)
    unroll = config.unroll_layers or groups
    carry, new = jax.lax.scan(group, carry, inputs, unroll=unroll)
    new = jax.tree.map(
        lambda v: reshape(v, (whole, *v.shape[2:]), (None, *range(2, v.ndim))), new
    )
    rest = range(whole, config.num_layers)
    if rest:
        carry, more = steps(carry, whole, pick(layers, rest), pick(cache, rest))
        if more is not None:
            new = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, _stack(more))
    x, buffers = carry
    return x, new, _read(buffers, taps)


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


def _buffers(block, taps, slots, x, kind, params, cache) -> dict[str, Array]:
    """Zeros for the tapped values, with one more place for layers not selected."""
    if not taps:
        return {}
    _, _, values = jax.eval_shape(
        lambda x, params, cache: block(x, kind, params, cache), x, params, cache
    )
    missing = [tap.site for tap in taps if tap.site not in values]
    assert not missing, missing
    places = {tap.site: int(slots[tap.site].max()) + 1 for tap in taps}
    places |= {tap.site: len(tap.layers) + 1 for tap in taps if tap.layers is not None}

    def zeros(value, n: int) -> Array:
        partition = None if layout(value) is None else P(None, *value.sharding.spec)
        return jnp.zeros((n, *value.shape), value.dtype, out_sharding=partition)

    return {site: zeros(values[site], n) for site, n in places.items()}


def _read(buffers: dict[str, Array], taps: Sequence[Tap]) -> dict[str, Array]:
    return {
        tap.site: buffers[tap.site]
        if tap.layers is None
        else buffers[tap.site][: len(tap.layers)]
        for tap in taps
    }


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
