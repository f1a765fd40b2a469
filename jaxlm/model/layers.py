"""Running the blocks: scanned over groups of layers, or in a loop.

Stacked parameters `[L, ...]` are scanned, so that a program compiles in the time of one
group of layers. A group is one period of the layer patterns; layers that fill no whole
group (Gemma 3 1B has 26, in groups of 6) follow in a loop. A tuple of layers, as
decoding uses, runs in a loop as a whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.config import ModelConfig
from jaxlm.model.block import Block, Context, LayerKind, layer_kinds
from jaxlm.model.kv_cache import LayerCache
from jaxlm.model.params import apply
from jaxlm.ops.probe import Recorder
from jaxlm.types import Params

Caches = LayerCache | tuple[LayerCache, ...] | None


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything but the layer's slice of the stacked weights."""
    return primitive.name not in ("dynamic_slice", "squeeze")


REMAT_POLICIES = {
    "none": _all_but_weights,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


def run_layers(
    config: ModelConfig,
    layers: Params | tuple[Params, ...],
    x: Float[Array, "B T D"],
    context: Context,
    caches: Caches,
    recorder: Recorder,
) -> tuple[Float[Array, "B T D"], Caches, Recorder]:
    """All blocks.

    Args:
      layers, caches: both stacked, or both a tuple with one entry for each layer.

    Returns:
      The residual stream, the new caches, and the recorder with the tapped values.
    """
    blocks = [_block(config, kind) for kind in layer_kinds(config)]
    period, depth = len(blocks), config.num_layers
    stacked = not isinstance(layers, tuple)

    def group(carry, first, size):
        for i in range(size):
            x, caches, recorder = carry
            number = first + i
            layer = (layers, number) if stacked else (layers[number], None)
            cache = _take(caches, number)
            x, cache, values = blocks[i % period](*layer, x, context, cache)
            carry = x, _put(caches, number, cache), recorder.write(number, values)
        return carry, None

    carry, done = (x, caches, recorder), 0
    if stacked:
        done = depth // period * period
        firsts = jnp.arange(0, done, period)
        unroll = config.unroll_layers or len(firsts)
        one_group = partial(group, size=period)
        carry, _ = jax.lax.scan(one_group, carry, firsts, unroll=unroll)
    carry, _ = group(carry, done, depth - done)
    return carry


def _block(config: ModelConfig, kind: LayerKind) -> Callable[..., Any]:
    """`(layers, number, x, context, cache) -> (x, cache, tapped values)`, with remat.

    `layers` is stacked, or, without a number, one layer. Its weights are cut out of the
    stack inside, so that the backward pass cuts them out again and keeps no copy.
    """
    module = Block(config, kind, parent=None)

    def block(layers, number, x, context, cache):
        params = layers if number is None else _take(layers, number)
        return apply(module, params, x, context, cache)

    # A scan cannot merge the two computations of a block, so nothing needs to keep the
    # compiler from it.
    policy = REMAT_POLICIES[config.remat]
    return jax.checkpoint(block, policy=policy, prevent_cse=False)


def _take(layers: Any, number: Any) -> Any:
    """One layer of a stacked tree, or of a tuple of layers."""
    if isinstance(layers, tuple):
        return layers[number]
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), layers
    )


def _put(layers: Any, number: Any, new: Any) -> Any:
    """`layers` with one layer replaced."""
    if isinstance(layers, tuple):
        return (*layers[:number], new, *layers[number + 1 :])
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, number, 0), layers, new
    )
