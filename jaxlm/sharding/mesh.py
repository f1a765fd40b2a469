"""The device mesh that everything runs in, with one device or many."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from jaxlm.config import MeshConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    config: MeshConfig,
    # Type checkers take the alias jax.Device for a variable.
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Makes an Explicit mesh over `devices` (None: all) with the axes `AXES`.

    Explicit axes make shardings part of array types, so a wrong sharding is an error at
    trace time, even on one device.

    Raises:
      ValueError: if the product of the axis sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"mesh.{a} {getattr(config, a)}" for a in AXES)
        raise ValueError(
            f"{shape} does not use the {len(devices)} devices exactly: choose "
            "sizes whose product is their number, or -1 for one axis"
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices
    )


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
