"""Along `fsdp` the rings that weights go around follow the links between chips."""

import itertools

import numpy as np
import pytest
from jax.experimental import mesh_utils
from topology_case import Device

from jaxlm.config import MeshConfig
from jaxlm.sharding.mesh import device_grid, ring_hops
from jaxlm.sharding.ring_order import ring_order
from jaxlm.torus import ring_sizes, torus_dimensions

# Chips, sizes of data, fsdp and tensor, and the links that steps of each ring take.
# Most bytes go around the last.
CASES = [
    ("v4", "4x4x4", (1, 64, 1), [1, 1, 1]),
    ("v5p", "4x4x4", (1, 64, 1), [1, 1, 1]),
    ("v5p", "2x2x2", (1, 8, 1), [1, 1, 1]),
    ("v5p", "2x4x4", (1, 32, 1), [1, 1, 1]),
    # Two rings in a dimension of 4, which one goes through in steps of 2.
    ("v5p", "4x4x4", (1, 16, 4), [2, 1, 1]),
    ("v5p", "4x4x4", (2, 32, 1), [1, 1, 1]),
    ("v4", "4x4x8", (1, 64, 2), [2, 2, 1]),
    ("v5p", "4x4x8", (1, 64, 2), [2, 2, 1]),
    ("v5p", "4x4x8", (1, 32, 4), [2, 1, 1]),
    ("v5p", "4x4x8", (2, 64, 1), [2, 1, 1]),
    ("v5p", "4x4x8", (1, 128, 1), [1, 1, 1]),
    ("v5p", "4x8x8", (1, 64, 4), [2, 2, 1]),
    ("v5p", "4x8x8", (1, 32, 8), [2, 1, 1]),
    ("v5p", "4x8x8", (1, 16, 16), [2, 2, 1]),
    ("v5p", "4x8x8", (1, 256, 1), [1, 1, 1]),
    ("v5p", "4x4x16", (1, 256, 1), [2, 1, 1]),
    # Two rings of 4 in a dimension of 16.
    ("v5p", "4x4x16", (1, 64, 4), [4, 2, 1]),
    ("v5p", "4x4x12", (3, 64, 1), [2, 1, 1]),
    ("tpu7x", "4x4x4", (1, 64, 2), [1, 1, 1]),
    ("tpu7x", "4x4x8", (1, 64, 4), [2, 1, 1]),
    ("tpu7x", "4x4x8", (1, 256, 1), [1, 1, 1]),
    ("tpu7x", "4x8x8", (1, 512, 1), [1, 1, 1]),
    # Links close no row of 4, so a ring goes around squares of 2 x 2.
    ("v6e", "4x4x1", (1, 16, 1), [2, 1]),
    ("v6e", "16x16x1", (1, 256, 1), [1, 1]),
    ("v6e", "16x16x1", (1, 64, 4), [4, 2]),
]
KINDS = {"v4": ("TPU v4", 1), "v5p": ("TPU v5", 1), "v6e": ("TPU v6 lite", 1)}
KINDS["tpu7x"] = "TPU7x", 2


def torus(name, chips):
    """Devices on a torus, and its lengths."""
    kind, cores = KINDS[name]
    lengths = [int(length) for length in chips.split("x")]
    places = itertools.product(*map(range, lengths), range(cores))
    devices = [
        Device(n, kind, list(chip), core, n // 4, 0)
        for n, (*chip, core) in enumerate(places)
    ]
    return devices, lengths


def links(one, other, lengths):
    """The shortest way from chip to chip; a dimension of 4, 8, ... is closed."""
    # Of v6e only whole rows and columns of the machine are closed.
    unit = 16 if lengths[2] == 1 else 4
    total = 0
    for a, b, length in zip(one.coords, other.coords, lengths, strict=True):
        way = abs(a - b)
        total += way if length % unit else min(way, length - way)
    return total


def steps_of_rings(grid, sizes, lengths):
    """The most links that a step of each ring takes, with the rings as permutes go."""
    found, stride = [], 1
    for size in sizes:
        worst = 0
        for data, _, tensor in np.ndindex(grid.shape[0], 1, grid.shape[-1]):
            group = grid[data, :, 0, 0, tensor]
            for n, device in enumerate(group):
                place = n // stride % size
                following = n + ((place + 1) % size - place) * stride
                worst = max(worst, links(device, group[following], lengths))
        found.append(worst)
        stride *= size
    return found


@pytest.mark.parametrize(
    "name, chips, mesh, wanted", CASES, ids=lambda value: str(value).replace(", ", "x")
)
def test_links_that_a_step_of_a_ring_takes(name, chips, mesh, wanted):
    devices, lengths = torus(name, chips)
    data, fsdp, tensor = mesh
    grid = device_grid(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    sizes = ring_sizes(fsdp, torus_dimensions(KINDS[name][0]))
    assert steps_of_rings(grid, sizes, lengths) == wanted
    assert ring_hops(grid)["fsdp"] == max(wanted)
    # Who is in a group with whom, and in which order along the other axes, stays.
    before = mesh_utils.create_device_mesh(
        grid.shape, devices, allow_split_physical_axes=True
    )
    assert {d.id for d in grid.flat} == {d.id for d in devices}
    assert {tuple(row) for row in grid.reshape(data, fsdp, -1)[0].tolist()} == {
        tuple(row) for row in before.reshape(data, fsdp, -1)[0].tolist()
    }


@pytest.mark.parametrize(
    "name, chips, mesh",
    [
        ("v5p", "4x4x4", (1, 64, 1)),  # one link a step
        ("tpu7x", "2x2x4", (1, 8, 4)),  # groups that fill no box
        ("v5p", "4x4x12", (1, 192, 1)),  # one ring, which is not passed around
    ],
    ids=str,
)
def test_other_meshes_stay_as_they_are(name, chips, mesh):
    devices, _ = torus(name, chips)
    data, fsdp, tensor = mesh
    grid = device_grid(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    before = mesh_utils.create_device_mesh(
        grid.shape, devices, allow_split_physical_axes=True
    )
    assert (grid == before).all()


def test_one_ring_without_links_back_goes_there_over_every_other_chip():
    places = np.stack([np.arange(8), np.zeros(8, int), np.zeros(8, int)], axis=1)
    cores, open_, closed = np.zeros(8, int), np.zeros(3, int), np.array([8, 0, 0])
    order = ring_order(places[:, None], cores, [8], open_)
    assert order.tolist() == [0, 2, 4, 6, 7, 5, 3, 1]
    order = ring_order(places[:, None], cores, [8], closed)
    assert order.tolist() == list(range(8))
