"""The mesh over the devices that are there."""

import jax
import pytest
from jax.sharding import AxisType

from jaxlm.config import MeshConfig
from jaxlm.sharding.mesh import AXES, make_mesh

ONE = jax.devices()[:1]


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
