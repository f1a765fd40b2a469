"""Meshes over the topologies that the compilers of TPUs know."""

import jax
import pytest
from jax.experimental import topologies
from test_mesh import check_layout
from topology_case import MESHES, TOPOLOGIES, devices_of

from jaxlm.sharding.mesh import AXES, ring_hops

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_mesh_is_laid_out(name, slices, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    more = {"num_slices": 2} if slices == 2 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    devices = found.devices
    imitated = devices_of(name, slices)
    for fsdp, tensor in MESHES:
        if len(devices) // slices % (fsdp * tensor) == 0:
            grid = check_layout(devices, slices, fsdp, tensor)
            # The quick tests imitate the devices.
            assert ring_hops(grid) == ring_hops(
                check_layout(imitated, slices, fsdp, tensor)
            )
            jax.sharding.Mesh(grid, AXES)
