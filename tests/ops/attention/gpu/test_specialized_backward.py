"""The order in which the warpgroups of the backward kernels read and write.

test_gpu_check.py has their results.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from ops_case import make_spec, normal

from jaxlm.ops.attention.gpu import specialized_backward, warpgroup
from jaxlm.ops.attention.gpu.gpu_settings import GpuSettings


@pytest.mark.slow
def test_no_races(monkeypatch):
    """No warpgroup reads what a copy may be writing, or the reverse."""
    params = dataclasses.replace(warpgroup.interpreter(), detect_races=True)
    monkeypatch.setattr(warpgroup, "interpreter", lambda: params)
    T, heads, H = 320, 1, 32
    q, k, v, dz = (
        jnp.asarray(normal(i, 1, T, heads, H), jnp.bfloat16) for i in range(4)
    )
    rows = jnp.zeros((1, heads, T))
    settings = GpuSettings(interpret=True, backward="specialized", backward_buffers=3)
    grads = specialized_backward.backward(
        q, k, v, make_spec(0.2), rows, rows, dz, settings
    )
    assert all(jnp.abs(x.astype(jnp.float32)).max() > 0 for x in grads)
    # JAX has no public name for this.
    assert not gpu_callbacks.get_races().races_found
