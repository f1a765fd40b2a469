"""What a training run needs at least in the memory of a device, before it allocates.

The state and the gradients are counted exactly. Of the activations only those that no
compiler can avoid are counted, so that nothing that fits is refused: the input of each
layer, which the backward pass starts from, and the logits.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.ops.linear import compute_dtype
from jaxlm.sharding.device_memory import gib
from jaxlm.sharding.rules import batch_parts, context_parts


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most."""

    parameters: int
    optimizer: int
    """State of the optimizer."""
    gradients: int
    layer_inputs: int
    """Of the rows of a microbatch."""
    logits: int
    """Of the rows of a microbatch, or of `train.loss_chunk` tokens."""

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = dataclasses.asdict(self).items()
        return ", ".join(f"{k.replace('_', ' ')} {gib(v)}" for k, v in parts)


def training_memory(config: Config, params: Any, opt_state: Any) -> Memory:
    """Returns what a step needs at least, on the current mesh.

    Args:
      config: the whole run.
      params: `jax.ShapeDtypeStruct`s with shardings (`train/state.py`).
      opt_state: likewise.
    """
    model, train = config.model, config.train
    parts = batch_parts()
    rows = max(train.batch_size // train.accumulation_steps // parts, 1)
    tokens = rows * config.data.sequence_length // context_parts()
    at_once = min(
        tokens, max(train.loss_chunk // parts, 1) if train.loss_chunk else tokens
    )
    width = compute_dtype(model.dtype).itemsize
    parameters = _num_bytes(params)
    return Memory(
        parameters=parameters,
        optimizer=_num_bytes(opt_state),
        gradients=parameters,
        layer_inputs=tokens * model.num_layers * model.model_dim * width,
        logits=at_once * model.vocab_size * width // _mesh_size("tensor"),
    )


def check_fits(config: Config, params: Any, opt_state: Any, available: int) -> None:
    """Checks that a run can fit into `available` bytes on each device.

    Raises:
      ValueError: if not; with the numbers, and the nearest choice that fits.
    """
    needed = training_memory(config, params, opt_state)
    if needed.total <= available:
        return
    raise ValueError(
        f"the run needs at least {gib(needed.total)} on a device, which has "
        f"{gib(available)} ({needed}): {_nearest_choice(config, needed, available)}"
    )


def _nearest_choice(config: Config, needed: Memory, available: int) -> str:
    batch = config.train.batch_size
    fixed = needed.parameters + needed.optimizer + needed.gradients
    per_part = (needed.layer_inputs + needed.logits) * config.train.accumulation_steps
    for parts in range(config.train.accumulation_steps + 1, batch + 1):
        if batch % parts == 0 and fixed + per_part // parts <= available:
            least = gib(fixed + per_part // parts)
            return f"train.accumulation_steps {parts} needs at least {least}"
    share = available / needed.total
    devices = math.ceil(1 / share) * _mesh_size("fsdp")
    if devices <= jax.device_count():
        return f"shard it over more devices: mesh.fsdp {devices}"
    layers = int(config.model.num_layers * share)
    smaller = f"model.num_layers {layers}" if layers else "a smaller model"
    return f"take {smaller}, or about {devices:,} such devices with mesh.fsdp"


def _mesh_size(axis: str) -> int:
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _num_bytes(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
