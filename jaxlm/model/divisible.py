"""The form of a model that the tensor axis of the mesh divides.

Two sizes of published models often stand in the way: the number of key heads and that
of the vocabulary. Where the axis does not divide them, each key head is repeated, and
the vocabulary is padded, while the model runs. The parameters that are stored, trained
and exported keep their shapes: they are cut along D instead (`sharding/rules.py`), and
devices exchange the parts when a step begins. Gradients come back the same way.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxlm import tree
from jaxlm.config import ModelConfig
from jaxlm.model.block import Block
from jaxlm.model.params import weights
from jaxlm.ops.layout import layout, reshape
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding import rules
from jaxlm.types import OutputsFirst, Params, Quantized


def divisible_config(config: ModelConfig, block: type[Block] = Block) -> ModelConfig:
    """Returns the config of the model that runs on the current mesh.

    It is `config` itself, or has more key heads or a larger vocabulary. Another `block`
    has to divide its key heads itself.

    Raises:
      ValueError: if mesh.tensor does not divide the query heads.
    """
    parts = rules.tensor_parts()
    padding = -config.vocab_size % parts
    copies = 1
    if block is Block:
        if config.num_heads % parts:
            raise ValueError(
                f"mesh.tensor is {parts}, which does not divide model.num_heads "
                f"{config.num_heads}: choose a divisor of it"
            )
        # Each query head keeps its key head: the copies divide the queries of one.
        queries = config.num_heads // config.num_kv_heads
        while queries % copies or config.num_kv_heads * copies % parts:
            copies += 1
    if copies == 1 and not padding:
        return config
    return replace(
        config,
        num_kv_heads=config.num_kv_heads * copies,
        vocab_size=config.vocab_size + padding,
    )


def divisible_params(
    config: ModelConfig, params: Params, block: type[Block] = Block
) -> Params:
    """Returns parameters with as many key heads and tokens as `config` has.

    Args:
      config: from `divisible_config`.
      params: of the same model, or a part of them; `layers` may be a tuple of layers.
      block: as in `divisible_config`.
    """
    sizes = {"V": config.vocab_size}
    if block is Block:
        sizes["K"] = config.num_kv_heads

    def leaf(
        path: str, x: Array | Quantized | OutputsFirst
    ) -> Array | Quantized | OutputsFirst:
        weight = weights(config).get(re.sub(r"^layers/\d+/", "layers/", path))
        if weight is None:
            return x
        axes = weight.axes[-x.ndim :]
        for axis, letter in enumerate(weight.dimensions[-x.ndim :]):
            size = sizes.get(letter, 0)
            if x.shape[axis] < size:
                enlarge = _repeat if letter == "K" else _pad
                x = jax.tree.map(partial(enlarge, axis=axis, size=size), x)
                return jax.tree.map(partial(rules.reshard_axes, axes=axes), x)
        return x

    return tree.map_with_name(leaf, params)


def check_sites(
    config: ModelConfig,
    taps: Sequence[Tap],
    edits: Sequence[Edit],
    block: type[Block] = Block,
) -> None:
    """Checks that sites have their own shapes in the form that runs on this mesh.

    Logits may be tapped: `forward` cuts off their padding.

    Raises:
      ValueError: if one has another shape.
    """
    running = divisible_config(config, block)
    keys = "K" * (running.num_kv_heads != config.num_kv_heads)
    tokens = "V" * (running.vocab_size != config.vocab_size)
    for one in (*taps, *edits):
        changed = keys if isinstance(one, Tap) else keys + tokens
        if set(changed) & set(SITES[one.site].shape.split()):
            raise ValueError(
                f"site {one.site!r} has another shape on this mesh, since mesh.tensor "
                f"{rules.tensor_parts()} does not divide model.num_kv_heads "
                f"{config.num_kv_heads} or model.vocab_size {config.vocab_size}: take "
                "a mesh where it does"
            )


def _repeat(x: Array, axis: int, size: int) -> Array:
    """Repeats each entry along an axis: a, a, b, b."""
    copies = size // x.shape[axis]
    shape = (*x.shape[: axis + 1], copies, *x.shape[axis + 1 :])
    repeated = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    kept = [n if n <= axis else n + 1 for n in range(x.ndim)]
    return reshape(repeated, (*x.shape[:axis], size, *x.shape[axis + 1 :]), kept)


def _pad(x: Array, axis: int, size: int) -> Array:
    """Appends zeros along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def without_padding(
    logits: Float[Array, "B T V"], vocab_size: int
) -> Float[Array, "B T {vocab_size}"]:
    """Returns the logits of a vocabulary that may have been padded."""
    if logits.shape[-1] == vocab_size:
        return logits
    placed = layout(logits)
    assert placed is not None
    whole = P(*placed.spec.partitions[:-1], None)
    return jax.sharding.reshard(logits, whole)[..., :vocab_size]
