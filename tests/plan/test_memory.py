"""The least memory of a run, compared with that of the compiled step."""

import dataclasses

import jax
import pytest
from toy_case import make_batch, toy

from jaxlm.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.plan import memory
from jaxlm.sharding.device_memory import available_memory
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.rules import batch_sharding
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.state import abstract_state
from jaxlm.train.step import make_train_step


def config_of(optimizer="adamw", model=None, **train):
    return Config(
        model=toy(vocab_size=512, model_dim=64, hidden_dim=128, **(model or {})),
        data=DataConfig(sequence_length=64),
        optimizer=OptimizerConfig(name=optimizer),
        train=TrainConfig(**{"batch_size": 8, "steps": 10, **train}),
    )


def state_of(config):
    optimizer = make_optimizer(config.optimizer, 10)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return optimizer, abstract_state(config.model, optimizer, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, factor", [("adamw", 3.0), ("muon", 3.0)])
def test_the_compiled_step_needs_no_less_and_not_much_more(optimizer, factor):
    config = config_of(optimizer)
    transformation, state = state_of(config)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    step = make_train_step(config, transformation)
    with jax.set_mesh(mesh):
        batch = jax.device_put(make_batch(config.model, 8, 64), batch_sharding(mesh))
        found = step.lower(state, batch).compile().memory_analysis()
    actual = found.argument_size_in_bytes + found.temp_size_in_bytes
    least = memory.training_memory(config, state.params, state.opt_state)
    state_bytes = least.parameters + least.optimizer
    assert found.argument_size_in_bytes == pytest.approx(state_bytes, rel=0.05)
    assert least.total <= actual <= factor * least.total


@pytest.mark.parametrize(
    "changes, share, words",
    [
        ({}, 0.7, "train.accumulation_steps 4 needs at least 0.0021"),
        ({"accumulation_steps": 8}, 0.6, "take model.num_layers 1, or about 2 such"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(changes, share, words):
    config = config_of(**changes)
    _, state = state_of(config)
    least = memory.training_memory(config, state.params, state.opt_state)
    memory.check_fits(config, state.params, state.opt_state, least.total)
    with pytest.raises(ValueError, match="the run needs at least") as caught:
        available = int(share * least.total)
        memory.check_fits(config, state.params, state.opt_state, available)
    assert words in str(caught.value) and "parameters 0.00" in str(caught.value)


def test_a_model_of_1e25_parameters_is_refused():
    config = config_of()
    huge = {"num_layers": 10**9, "model_dim": 10**8, "hidden_dim": 10**8}
    model = dataclasses.replace(config.model, **huge)
    config = dataclasses.replace(config, model=model)
    _, state = state_of(config)
    with pytest.raises(
        ValueError, match=r"take a smaller model, or about .* such devices"
    ):
        available = available_memory()
        memory.check_fits(config, state.params, state.opt_state, available)
