"""The training state, carried from step to step."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import ModelConfig
from jaxlm.model.initialization import init
from jaxlm.model.params import parameter_shardings
from jaxlm.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step updates. PRNG keys are derived from seed and step."""

    # `Any`: leaves are arrays, or in `abstract_state` shapes.
    step: Any
    """Number of steps done, also skipped ones, an int32 scalar."""
    params: Any
    """`Params`: the master weights, f32."""
    opt_state: Any
    """The state of the optax transformation."""
    spikes: Any = None
    """`SpikeHistory`; None if spikes are not skipped (`train.skip_spikes`)."""


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """Initializes a state at step 0, each leaf directly on its devices.

    Call it inside `jax.set_mesh(mesh)`.
    """
    return jax.jit(_build, static_argnums=(0, 1, 3))(
        config, optimizer, jax.random.key(seed), mesh
    )


def state_from(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes a state at step 0 with these parameters (f32), sharded as they are."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the shapes, dtypes and shardings of `init_state`; computes nothing.

    Raises:
      ValueError: if a mesh axis does not divide a dimension that it shards.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    if mesh.size > 1:
        # Traced without the mesh. With it JAX's own error comes first, which names
        # neither the parameter nor a remedy.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            params = jax.eval_shape(lambda key: init(config, key), key)
        parameter_shardings(params, mesh)
    shapes = jax.eval_shape(lambda key: _build(config, optimizer, key, mesh), key)

    def on_mesh(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(on_mesh, shapes)


def _build(config, optimizer, key, mesh) -> TrainState:
    params = init(config, key)
    shardings = parameter_shardings(params, mesh)
    params = jax.tree.map(jax.sharding.reshard, params, shardings)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
