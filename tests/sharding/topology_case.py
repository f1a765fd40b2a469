"""Devices of TPUs that are not here."""

import itertools
from dataclasses import dataclass

# Kind, chips in each direction, cores that are devices of their own.
TOPOLOGIES = {
    "v5e:8x16": ("TPU v5 lite", (8, 16, 1), 1),
    "v5e:16x16": ("TPU v5 lite", (16, 16, 1), 1),
    "v5p:4x4x8": ("TPU v5", (4, 4, 8), 1),
    "v5p:4x8x8": ("TPU v5", (4, 8, 8), 1),
    "v6e:8x16": ("TPU v6 lite", (8, 16, 1), 1),
    "v6e:16x16": ("TPU v6 lite", (16, 16, 1), 1),
    "tpu7x:4x4x4": ("TPU7x", (4, 4, 4), 2),
    "tpu7x:4x4x8": ("TPU7x", (4, 4, 8), 2),
    "tpu7x:4x8x8": ("TPU7x", (4, 8, 8), 2),
}
# fsdp, tensor
MESHES = ((64, 4), (64, 2), (32, 8), (16, 16))


@dataclass(frozen=True)
class Device:
    id: int
    device_kind: str
    coords: list[int]
    core_on_chip: int
    process_index: int
    slice_index: int
    platform: str = "tpu"

    def __hash__(self):
        return self.id


def devices_of(name, slices=1):
    """Devices in the order of JAX: the first coordinate changes fastest."""
    kind, chips, cores = TOPOLOGIES[name]
    ranges = [range(slices), *map(range, chips[::-1]), range(cores)]
    places = itertools.product(*ranges)
    return [
        Device(number, kind, [x, y, z], core, number // 4, number_of_slice)
        for number, (number_of_slice, z, y, x, core) in enumerate(places)
    ]
