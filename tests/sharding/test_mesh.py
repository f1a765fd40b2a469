"""The mesh over the devices that are there."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from topology_case import MESHES, TOPOLOGIES, devices_of

from jaxlm.commands.doctor import mesh_layout
from jaxlm.config import Config, DataConfig, MeshConfig, TrainConfig
from jaxlm.model.presets import preset
from jaxlm.sharding.mesh import (
    AXES,
    check_batch,
    device_grid,
    make_mesh,
    num_slices,
    ring_hops,
)

ONE = jax.devices()[:1]
MODEL = preset("smollm2-135m")


def test_one_device():
    for config in (MeshConfig(), MeshConfig(data=1), MeshConfig(data=1, fsdp=-1)):
        mesh = make_mesh(config, ONE)
        assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
        assert mesh.axis_types == (AxisType.Explicit,) * len(AXES)
        assert list(mesh.devices.flat) == ONE


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 2}, {"data": 1, "tensor": 2}, {"data": 2}, {"data": 3, "fsdp": 2}],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(
        ValueError, match=r"does not use the 1 devices exactly: choose sizes whose prod"
    ) as caught:
        make_mesh(MeshConfig(**sizes), ONE)
    for axis, size in sizes.items():
        assert f"{axis} {size}" in str(caught.value)


def sizes(**changes):
    """The size of each axis."""
    return dataclasses.astuple(MeshConfig(**{"data": 1} | changes))


def check_layout(devices, slices, fsdp, tensor):
    """Each device is in the grid once, and no group leaves its slice."""
    grid = device_grid(MeshConfig(fsdp=fsdp, tensor=tensor), devices)
    data = len(devices) // (fsdp * tensor)
    assert grid.shape == sizes(data=data, fsdp=fsdp, tensor=tensor)
    assert {d.id for d in grid.flat} == {d.id for d in devices}
    assert num_slices(devices) == slices
    for replica in grid:
        assert len({getattr(d, "slice_index", 0) for d in replica.flat}) == 1
    return grid


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_mesh_is_laid_out_on_its_topology(name, slices):
    devices = devices_of(name, slices)
    shuffled = list(np.random.default_rng(0).permutation(np.array(devices, object)))
    chips = np.array(TOPOLOGIES[name][1])
    for fsdp, tensor in MESHES:
        if len(devices) // slices % (fsdp * tensor):
            continue
        grid = check_layout(devices, slices, fsdp, tensor)
        assert (check_layout(shuffled, slices, fsdp, tensor) == grid).all()
        hops = ring_hops(grid)
        # Rings along tensor are short, and none goes across the machine. In the order
        # of JAX's devices, that of v5e:16x16 with tensor 8 would take up to 15.
        assert hops["tensor"] <= 7
        assert all(0 <= n <= chips.sum() // 2 for n in hops.values()), hops


def test_the_hops_of_a_ring_by_hand():
    row = [d for d in devices_of("v5e:16x16") if d.coords[1:] == [0, 0]]
    for order, hops in (
        (range(16), 1),  # a closed ring of all 16
        ([*range(0, 16, 2), *range(15, 0, -2)], 2),
        ([0, 8, *range(1, 8), *range(9, 16)], 8),
    ):
        grid = np.array(row, object)[list(order)].reshape(sizes(fsdp=16))
        assert ring_hops(grid) == dict.fromkeys(AXES, 0) | {"fsdp": hops}
    half = np.array(row[:8], object).reshape(sizes(tensor=8))
    assert ring_hops(half)["tensor"] == 7  # 8 chips in a row: the ends have no link
    square = [d for d in devices_of("v5e:16x16") if max(d.coords) < 2]
    square = np.array([square[i] for i in (0, 1, 3, 2)], object).reshape(
        sizes(tensor=4)
    )
    assert ring_hops(square)["tensor"] == 1
    assert ring_hops(np.array(ONE).reshape(sizes())) == dict.fromkeys(AXES)
    cores = devices_of("tpu7x:4x4x4")[:2]
    cores = np.array(cores, object).reshape(sizes(tensor=2))
    assert ring_hops(cores)["tensor"] == 0  # two cores of one chip


def test_the_layout_is_described():
    devices = devices_of("v5e:16x16", 2)
    grid = device_grid(MeshConfig(fsdp=64, tensor=4), devices)
    fsdp, tensor = ring_hops(grid)["fsdp"], ring_hops(grid)["tensor"]
    assert mesh_layout(grid) == (
        "data 2 x fsdp 64 x expert 1 x context 1 x tensor 4; data goes over 2 slices; "
        f"links that a step around an axis takes: fsdp {fsdp}, tensor {tensor}"
    )
    grid = device_grid(MeshConfig(data=1), ONE)
    assert mesh_layout(grid) == "data 1 x fsdp 1 x expert 1 x context 1 x tensor 1"


def test_slices_that_data_does_not_hold_are_refused():
    devices = devices_of("v5e:8x16", 2)
    for sizes in ({"fsdp": 256}, {"data": 1, "fsdp": 64, "tensor": 4}):
        with pytest.raises(
            ValueError,
            match=r"^mesh\.data .* does not fit 2 slices of 128 devices: mesh\.data "
            r"must be a multiple of 2$",
        ):
            device_grid(MeshConfig(**sizes), devices)


@pytest.mark.parametrize(
    "rows, parts, message",
    [
        (4, 1, r"is 4, .* on mesh\.data 2 x mesh\.fsdp 4: make it a multiple of 8$"),
        (8, 2, r"is 8, .* in train\.accumulation_steps 2: make it a multiple of 16$"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(rows, parts, message):
    mesh = AbstractMesh(sizes(data=2, fsdp=4, tensor=3), AXES)
    train = TrainConfig(batch_size=rows, accumulation_steps=parts)
    with pytest.raises(ValueError, match=message):
        check_batch(Config(model=MODEL, train=train), mesh)
    train = TrainConfig(batch_size=16, accumulation_steps=2)
    check_batch(Config(model=MODEL, train=train), mesh)


@pytest.mark.parametrize(
    "sequence_parallel, length, message",
    [
        (False, 20, r"the 8 pieces of mesh\.context 4: make it a multiple of 8$"),
        (True, 16, r"mesh\.context 4 x mesh\.tensor 3: make it a multiple of 12$"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(sequence_parallel, length, message):
    mesh = AbstractMesh(sizes(context=4, tensor=3), AXES)
    model = dataclasses.replace(MODEL, sequence_parallel=sequence_parallel)
    train, data = TrainConfig(batch_size=2), DataConfig(sequence_length=48)
    config = Config(model=model, train=train, data=data)
    check_batch(config, mesh)
    data = DataConfig(sequence_length=length)
    with pytest.raises(
        ValueError, match=rf"^data\.sequence_length is {length}, .*{message}"
    ):
        check_batch(dataclasses.replace(config, data=data), mesh)
