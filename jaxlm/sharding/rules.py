"""The sharding rules: the mesh axis of each logical axis.

Dimensions are written as the letters of `types.py`. Each letter stands for a logical
axis, and `MESH_AXES` maps that to mesh axes. The letters of parameters are in
`model/params.py`, those of activations where they are computed.
"""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

LOGICAL_AXES = {
    "B": "batch",
    "T": "length",
    "D": "model",
    "N": "heads",
    "K": "key_heads",
    "F": "hidden",
    "V": "vocab",
    "L": "layers",
    "E": "experts",
}

# Logical axis -> mesh axes; None is never sharded. `model` is the width of parameters,
# sharded for storage (fsdp) and gathered for use; that of activations is not sharded.
# `experts` are those of parameters too: activations have the logits of all.
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "model": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "key_heads": "tensor",
    "hidden": "tensor",
    "layers": None,
    "experts": "expert",
}
# Where `tensor` does not divide these, parameters are stored with them whole and are
# cut along `model` instead; the model runs in another form (`model/divisible.py`).
MADE_DIVISIBLE = ("key_heads", "vocab")


def logical_axes(letters: str) -> tuple[str | None, ...]:
    """Returns the logical axis of each letter; None for others, such as `_` and H."""
    return tuple(LOGICAL_AXES.get(letter) for letter in letters)


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def spec(*axes: str | None) -> P:
    """Returns the partition of an array whose dimensions are the logical `axes`.

    Raises:
      ValueError: if two dimensions would be sharded over one mesh axis.
    """
    entries = [None if axis is None else MESH_AXES[axis] for axis in axes]
    used: list[str] = []
    for entry in entries:
        for mesh_axis in _mesh_axes(entry):
            if mesh_axis in used:
                raise ValueError(f"axes {axes} put two dimensions on {mesh_axis!r}")
            used.append(mesh_axis)
    return P(*entries)


def activation_spec(letters: str) -> P | None:
    """Returns the partition of an activation, e.g. `BTNH`, in the current mesh.

    None without a mesh, if an axis is Auto or if none is Explicit: then the compiler
    decides. Inside a `shard_map` of some axes, it is the partition over the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types or AxisType.Auto in mesh.axis_types:
        return None
    whole = {"model", "experts"}
    if _parts("length", mesh) == 1:
        whole.add("length")
    axes = logical_axes(letters)
    return _here(spec(*(None if axis in whole else axis for axis in axes)))


def _here(partition: P) -> P:
    """Drops the axes of the `shard_map` that this is called in."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return partition
    kept = [tuple(a for a in _mesh_axes(e) if a not in manual) for e in partition]
    return P(*(entry or None for entry in kept))


def reshard(x: Array, letters: str) -> Array:
    """Shards x as an activation of these letters; a no-op without an Explicit mesh."""
    partition = activation_spec(letters)
    return x if partition is None else jax.sharding.reshard(x, partition)


def reshard_axes(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Shards x by logical axes; a no-op without an Explicit mesh.

    An axis of size 1, as scales of quantized weights have, is not cut.
    """
    if activation_spec("B") is None:
        return x
    pairs = zip(x.shape, axes, strict=True)
    axes = tuple(None if size == 1 else axis for size, axis in pairs)
    return jax.sharding.reshard(x, _here(spec(*axes)))


def cut_stream(x: Array) -> Array:
    """Cuts the residual stream [B, T, D] along T over `tensor` too."""
    batch, length, model = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, P(batch, (*_mesh_axes(length), "tensor"), model))


def gather_stream(x: Array) -> Array:
    """Undoes `cut_stream`; a no-op for x that is not cut so."""
    if tensor_parts() == 1:
        return x
    whole, cut = _without_tensor(x), jax.typeof(x).sharding.spec
    return x if whole == cut else jax.sharding.reshard(x, whole)


def reshard_input(x: Array) -> Array:
    """Shards a block's input [B, T, D] for weights that `tensor` cuts: T and D whole.

    Devices along `tensor` add up its gradient once, after that of all its uses. A no-op
    with one such device.
    """
    if tensor_parts() == 1:
        return x
    whole = _without_tensor(x).update(reduced=summed_once())
    return jax.sharding.reshard(x, whole)


def _without_tensor(x: Array) -> P:
    """Returns the partition of x with T whole along `tensor`."""
    batch, length, model = jax.typeof(x).sharding.spec
    kept = tuple(axis for axis in _mesh_axes(length) if axis != "tensor")
    return P(batch, kept or None, model)


def reshard_output(y: Array, x: Array) -> Array:
    """Shards the output y of a block as its input x. A no-op as `reshard_input` is.

    Devices exchange their sums here, if y is `unreduced`.
    """
    if tensor_parts() == 1:
        return y
    return jax.sharding.reshard(y, jax.typeof(x).sharding.spec)


def summed_once() -> set[str]:
    """Returns the mesh axes along which sums are made by `reshard`, not by products.

    There are none inside a `shard_map`: there XLA of jax 0.10 to 0.12 cannot partition
    `unreduced` arrays.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return set() if manual or tensor_parts() == 1 else {"tensor"}


def expert_axes() -> tuple[str, ...]:
    """Returns the mesh axes that cut experts, in a `shard_map` of them; else none.

    There each device has its own experts.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in _mesh_axes(MESH_AXES["experts"]) if axis in manual)


def own_size(size: int, axis: str | None) -> int:
    """Returns the size of a parameter along a logical axis, as this device has it."""
    mesh = jax.sharding.get_abstract_mesh()
    own = expert_axes() if axis == "experts" else ()
    return size // math.prod(mesh.shape[name] for name in own)


def batch_parts() -> int:
    """Number of shards of a batch in the current mesh; 1 without an Explicit mesh."""
    return _parts_here("batch")


def context_parts() -> int:
    """Number of parts of each row in the current mesh; 1 without an Explicit mesh."""
    return _parts_here("length")


def tensor_parts() -> int:
    """Number of shards of heads in the current mesh; 1 without an Explicit mesh."""
    return _parts_here("heads")


def _parts_here(axis: str) -> int:
    if activation_spec("B") is None:
        return 1
    return _parts(axis, jax.sharding.get_abstract_mesh())


def _parts(axis: str, mesh: Mesh | AbstractMesh) -> int:
    manual = mesh.manual_axes if isinstance(mesh, AbstractMesh) else ()
    names = [name for name in _mesh_axes(MESH_AXES[axis]) if name not in manual]
    return math.prod(mesh.shape[name] for name in names)


def sharding(
    path: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    mesh: Mesh | AbstractMesh,
) -> NamedSharding:
    """Returns the sharding of the parameter `path`, given its logical axes.

    Raises:
      ValueError: if a mesh axis does not divide its dimension of the parameter.
    """
    partition = _stored_spec(shape, axes, mesh)
    for size, entry in zip(shape, partition, strict=True):
        for mesh_axis in _mesh_axes(entry):
            if size % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"mesh.{mesh_axis} is {mesh.shape[mesh_axis]}, which does not "
                    f"divide {size} in the shape {shape} of {path!r}: choose another "
                    f"mesh.{mesh_axis} or another size"
                )
    return NamedSharding(mesh, partition)


def _stored_spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh
) -> P:
    """Returns the partition of a parameter; see `MADE_DIVISIBLE`."""
    entries = list(spec(*axes))
    both = ("fsdp", "tensor")
    for number, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis in MADE_DIVISIBLE and size % mesh.shape["tensor"]:
            entries[number] = None
            parts = math.prod(mesh.shape[name] for name in both)
            if "model" in axes and shape[axes.index("model")] % parts == 0:
                entries[axes.index("model")] = both
    return P(*entries)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of the arrays of a `Batch`, `[B, T]`."""
    length = "length" if _parts("length", mesh) > 1 else None
    return NamedSharding(mesh, spec("batch", length))
