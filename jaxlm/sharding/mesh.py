"""The device mesh that everything runs in, with one device or many."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxlm.config import Config, MeshConfig
from jaxlm.sharding.ring_order import ring_links, ring_order
from jaxlm.torus import permutes_beside, ring_sizes, torus_dimensions

AXES = tuple(axis.name for axis in dataclasses.fields(MeshConfig))


def make_mesh(
    config: MeshConfig,
    # Type checkers take the alias jax.Device for a variable.
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Makes an Explicit mesh over `devices` (None: all) with the axes `AXES`.

    Explicit axes make shardings part of array types, so a wrong sharding is an error at
    trace time, even on one device.

    Raises:
      ValueError: if the product of the axis sizes is not the number of devices, or the
        data axis cannot hold the slices of a TPU.
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(device_grid(config, devices), AXES, (AxisType.Explicit,) * len(AXES))


def make_mesh_of_size(config: MeshConfig) -> Mesh:
    """Makes a mesh of the first devices, as many as the sizes need.

    Raises:
      ValueError: if an axis has no size, or there are too few devices.
    """
    sizes = dataclasses.asdict(config)
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh.{axis} is {size}: give its number of devices")
    return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def device_grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Arranges devices in an array with the axes `AXES`, by the topology of a TPU.

    Neighbors along `tensor` are close to each other, those along `data` may be far
    apart. Where weights and gradients go around rings (`ops/collectives.py`), `fsdp` is
    in the order of these. The slices of a TPU, between which the network is slow, are
    parts of `data`.

    Raises:
      ValueError: as `make_mesh`.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // fixed
    shape = " x ".join(f"mesh.{a} {getattr(config, a)}" for a in AXES)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"{shape} does not use the {len(devices)} devices exactly: choose "
            "sizes whose product is their number, or -1 for one axis"
        )
    slices = num_slices(devices)
    if slices == 1:
        return _in_ring_order(
            mesh_utils.create_device_mesh(
                sizes, devices, allow_split_physical_axes=True
            )
        )
    data, *inside = sizes
    if data % slices:
        raise ValueError(
            f"{shape} does not fit {slices} slices of {len(devices) // slices} "
            f"devices: mesh.data must be a multiple of {slices}"
        )
    return _in_ring_order(
        mesh_utils.create_hybrid_device_mesh(
            (data // slices, *inside),
            (slices,) + (1,) * len(inside),
            devices,
            allow_split_physical_axes=True,
        )
    )


def _in_ring_order(grid: np.ndarray) -> np.ndarray:
    """The same groups along `fsdp`, in the order of the rings that it is cut into."""
    sizes = _rings(grid, "fsdp")
    if len(sizes) == 1:
        return grid
    axis = AXES.index("fsdp")
    groups = np.moveaxis(grid, axis, 0)
    cores = [device.core_on_chip for device in groups.reshape(len(groups), -1)[:, 0]]
    coords, period = _places(grid)
    places = np.moveaxis(coords, axis, 0)
    return grid.take(ring_order(places, np.array(cores), sizes, period), axis)


def num_slices(devices: Iterable[Any]) -> int:
    """Number of TPU slices that the devices are of; 1 on other platforms."""
    # Topologies of one slice that are only compiled for do not number it.
    on_torus = (device for device in devices if _is_on_torus(device))
    return len({getattr(device, "slice_index", 0) for device in on_torus}) or 1


def ring_hops(grid: np.ndarray) -> dict[str, int | None]:
    """Counts the links between chips that a step around each axis takes, at most.

    A collective operation along an axis sends data around rings of its devices. With 1
    hop it has the links for itself; with more, rings share them. Steps within a slice
    are counted, and where weights go by permutes those of `fsdp` around each of its
    rings. None on platforms whose topology JAX does not know.

    Args:
      grid: `Mesh.devices`.
    """
    if not all(_is_on_torus(device) for device in grid.flat):
        return dict.fromkeys(AXES)
    grid = grid[: len(grid) // num_slices(grid.flat)]
    coords, period = _places(grid)
    hops = {}
    for number, axis in enumerate(AXES):
        places = np.moveaxis(coords, number, 0)
        hops[axis] = max(ring_links(places, _rings(grid, axis), period))
    return hops


def _rings(grid: np.ndarray, axis: str) -> list[int]:
    """Sizes of the rings that data is passed around, step by step, along an axis."""
    size, device = grid.shape[AXES.index(axis)], grid.flat[0]
    if axis != "fsdp" or not _is_on_torus(device):
        return [size]
    if not permutes_beside(device.device_kind):
        return [size]
    return ring_sizes(size, torus_dimensions(device.device_kind))


def _places(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the devices' chips, and after how many of these links lead back.

    0: they do not.
    """
    coords = np.array([device.coords for device in grid.flat])
    chips = coords.max(axis=0) + 1
    # Links close a ring where a slice is as long as the machine (TPU v5e and v6e, 16 x
    # 16), or a multiple of its cubes of 4 (the others). cloud.google.com/tpu/docs
    unit = 16 if torus_dimensions(grid.flat[0].device_kind) == 2 else 4
    closed = chips % unit == 0
    return coords.reshape(*grid.shape, -1), np.where(closed, chips, 0)


def _is_on_torus(device: Any) -> bool:
    return device.platform == "tpu" and hasattr(device, "coords")


def check_batch(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Checks that a batch and its rows can be cut into equal parts on this mesh.

    Raises:
      ValueError: if they cannot.
    """
    train, length = config.train, config.data.sequence_length
    axes = ["data", "fsdp"] + ["expert"] * (mesh.shape["expert"] > 1)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if train.batch_size % (parts * train.accumulation_steps):
        once = train.accumulation_steps == 1
        raise ValueError(
            f"train.batch_size is {train.batch_size}, which does not divide into equal "
            f"parts on {' x '.join(f'mesh.{axis} {mesh.shape[axis]}' for axis in axes)}"
            + (f" in train.accumulation_steps {train.accumulation_steps}" * (not once))
            + f": make it a multiple of {parts * train.accumulation_steps}"
        )
    # Each device holds two pieces of a row, see `ops/attention/context_parallel.py`.
    pieces = 2 * mesh.shape["context"]
    if pieces > 2 and length % pieces:
        raise ValueError(
            f"data.sequence_length is {length}, which does not divide into the "
            f"{pieces} pieces of mesh.context {mesh.shape['context']}: make it a "
            f"multiple of {pieces}"
        )
    parts = mesh.shape["context"] * mesh.shape["tensor"]
    if config.model.sequence_parallel and length % parts:
        raise ValueError(
            f"data.sequence_length is {length}, which model.sequence_parallel cannot "
            f"cut over mesh.context {mesh.shape['context']} x mesh.tensor "
            f"{mesh.shape['tensor']}: make it a multiple of {parts}"
        )
