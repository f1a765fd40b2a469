"""Rows of a table on one device; `tests/multi_device` has those that are cut."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ops_case import normal

from jaxlm.config import MeshConfig
from jaxlm.ops.embedding import lookup
from jaxlm.sharding.mesh import make_mesh_of_size


def test_on_one_device_nothing_is_sent():
    """Compilers keep a sum over one device, and copy the gradient of the table."""
    table, ids = normal(0, 24, 8), np.array([[3, 1, 3], [0, 23, 5]], np.int32)
    weights = normal(1, 2, 3, 8)

    def total(table, ids):
        return jnp.sum(lookup(table, ids, jnp.float32) * weights)

    mesh = make_mesh_of_size(MeshConfig(data=1))
    with jax.set_mesh(mesh):
        table = jax.device_put(table, NamedSharding(mesh, P("tensor", "fsdp")))
        ids = jax.device_put(ids, NamedSharding(mesh, P(("data", "fsdp"))))
        program = jax.jit(jax.value_and_grad(total)).lower(table, ids).compile()
        value, gradient = program(table, ids)
    assert "all-" not in program.as_text()
    expected = np.zeros((24, 8))
    np.add.at(expected, np.asarray(ids), weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(value, np.sum(expected * np.asarray(table)), rtol=1e-5)
    assert gradient.sharding == table.sharding
