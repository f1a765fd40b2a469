"""Which mesh axis each logical axis lies on: the only table of its kind.

Parameters are matched by path, activations name their logical axes where they are
made. Both meet the mesh through `MESH_AXES`.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm import tree

# Logical axis -> mesh axes. `model` is the width of parameters, cut for storage
# (fsdp) and gathered when used; the width of activations is never cut (None).
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "model": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "hidden": "tensor",
    "experts": None,
}

# Path -> logical axes; the first row whose path matches and whose length is the rank.
# `layers` is the stacking axis; None is never cut.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/table", ("vocab", "model")),
    (r"embed/positions", (None, "model")),
    (r"lm_head/kernel", ("model", "vocab")),
    (r"layers/attn/[qkv]", ("layers", "model", "heads", None)),
    (r"layers/attn/o", ("layers", "heads", None, "model")),
    (r"layers/attn/[qkv]_bias", ("layers", "heads", None)),
    (r"layers/attn/o_bias", ("layers", None)),
    (r"layers/attn/sinks", ("layers", "heads")),
    (r"layers/attn/[qk]_norm/scale", ("layers", "heads", None)),
    (r"layers/attn/[qk]_norm/scale", ("layers", None)),
    (r"layers/mlp/(gate|up)", ("layers", "model", "hidden")),
    (r"layers/mlp/down", ("layers", "hidden", "model")),
    (r"layers/mlp/(gate|up)_bias", ("layers", "hidden")),
    (r"layers/mlp/down_bias", ("layers", None)),
    (r"layers/moe/router", ("layers", "model", "experts")),
    (r"layers/moe/router_bias", ("layers", "experts")),
    (r"layers/moe/(gate|up)", ("layers", "experts", "model", "hidden")),
    (r"layers/moe/down", ("layers", "experts", "hidden", "model")),
    (r"layers/moe/(gate|up)_bias", ("layers", "experts", "hidden")),
    (r"layers/moe/down_bias", ("layers", "experts", None)),
    (r"layers/\w+_norm/(scale|bias)", ("layers", None)),
    (r"final_norm/(scale|bias)", (None,)),
)


def spec(*axes: str | None) -> P:
    """The partition of an array whose dimensions are the logical `axes`.

    Raises:
      ValueError: when two dimensions would lie on one mesh axis.
    """
    entries = [None if a in (None, "layers") else MESH_AXES[a] for a in axes]
    used: list[str] = []
    for entry in entries:
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            if mesh_axis in used:
                raise ValueError(f"axes {axes} put two dimensions on {mesh_axis!r}")
            used.append(mesh_axis)
    return P(*entries)


def activation(*axes: str | None) -> P | None:
    """The partition of an activation in the current mesh; None without one.

    None too where the mesh axes are not Explicit: there the compiler decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(t != AxisType.Explicit for t in mesh.axis_types):
        return None
    return spec(*axes)


def lay_out(x: Array, *axes: str | None) -> Array:
    """x with the layout of its logical `axes`; x itself without an Explicit mesh."""
    out = activation(*axes)
    return x if out is None else jax.sharding.reshard(x, out)


def batch_parts() -> int:
    """Into how many parts the current mesh cuts a batch; 1 without an Explicit mesh."""
    if activation("batch") is None:
        return 1
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in MESH_AXES["batch"])


def parameter_spec(name: str, shape: tuple[int, ...]) -> P:
    """The partition of the parameter `name`.

    Raises:
      ValueError: when no rule matches.
    """
    for pattern, axes in PARAMETER_AXES:
        if len(axes) == len(shape) and re.fullmatch(pattern, name):
            return spec(*axes)
    raise ValueError(
        f"no sharding rule for the parameter {name!r} of shape {shape}: add one to "
        "PARAMETER_AXES in jaxlm/sharding/rules.py"
    )


def parameter_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A tree of `NamedSharding` for stacked parameters (arrays or shapes).

    Raises:
      ValueError: when a parameter has no rule or a mesh axis does not divide it.
    """

    def sharding(name: str, leaf: Any) -> NamedSharding:
        partition = parameter_spec(name, leaf.shape)
        for size, entry in zip(leaf.shape, partition, strict=True):
            for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
                if size % mesh.shape[mesh_axis]:
                    raise ValueError(
                        f"mesh.{mesh_axis} is {mesh.shape[mesh_axis]}, which does not "
                        f"divide {size} in the shape {leaf.shape} of {name!r}: choose "
                        f"another mesh.{mesh_axis} or another size (model.vocab_size "
                        "may be larger than the tokenizer's)"
                    )
        return NamedSharding(mesh, partition)

    return tree.map_with_name(sharding, params)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of every array of a `Batch`, `[B, T]`."""
    return NamedSharding(mesh, spec("batch", None))
