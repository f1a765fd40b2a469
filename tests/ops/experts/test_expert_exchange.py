"""The exchange of rows between devices, which `jax.vmap` imitates.

Values and gradients of experts on several devices are in tests/multi_device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.experts.expert_exchange import Slices, plan_exchange, send


def test_the_form_for_cpus_is_the_definition():
    """On the example of `jax.lax.ragged_all_to_all`."""
    rows = jnp.array([[1, 2, 2], [3, 4, 0]], jnp.float32)[..., None]
    slices = Slices(
        input_offsets=jnp.array([[0, 1], [0, 1]]),
        send_sizes=jnp.array([[1, 2], [1, 1]]),
        output_offsets=jnp.array([[0, 0], [1, 2]]),
        recv_sizes=jnp.array([[1, 1], [2, 1]]),
    )
    run = jax.jit(jax.vmap(partial(send, room=4, axes=("x",)), axis_name="x"))
    assert run(rows, slices)[..., 0].tolist() == [[1, 3, 0, 0], [2, 2, 4, 0]]


def test_rows_arrive_by_expert_and_come_home():
    """2 devices with 3 experts each, of which some get all and some no rows."""
    counts = np.array([[2, 0, 1, 0, 3, 1], [0, 0, 4, 1, 2, 0]])
    # Each row is its sender, its expert and its number in the slice.
    rows = np.array(
        [
            [(s, e, i) for e, n in enumerate(c) for i in range(n)]
            for s, c in enumerate(counts)
        ],
        np.float32,
    )

    def there_and_back(counts, rows):
        exchange = plan_exchange(counts, ("x",))
        received = send(rows, exchange.there, 14, ("x",))
        return exchange.sizes, received, send(received, exchange.back, 7, ("x",))

    run = jax.jit(jax.vmap(there_and_back, axis_name="x"))
    sizes, received, back = run(counts, rows)
    assert sizes.tolist() == [[2, 0, 5], [1, 5, 1]]
    for device, total in enumerate((7, 7)):
        wanted = [r for r in rows.reshape(-1, 3).tolist() if r[1] // 3 == device]
        wanted.sort(key=lambda row: (row[1], row[0], row[2]))
        assert received[device, :total].tolist() == wanted
        assert not received[device, total:].any()
    np.testing.assert_array_equal(back, rows)


def test_accelerators_send_only_these_rows():
    device = jax.sharding.AbstractDevice(
        device_kind="TPU v5", num_cores=1, platform="tpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("y",), abstract_device=device)
    rows = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    slices = Slices(*[jax.ShapeDtypeStruct((4,), jnp.int32)] * 4)
    run = partial(send, room=4, axes=("x",))
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(run, axis_env=[("x", 4)])(rows, slices)
    assert "ragged_all_to_all" in str(program) and "all_gather" not in str(program)
