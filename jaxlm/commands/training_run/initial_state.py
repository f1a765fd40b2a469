"""The state that a training run starts from."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.run_folder import CHECKPOINTS
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.config import Config
from jaxlm.data.loader import Dataset
from jaxlm.fields import diff
from jaxlm.plan.memory import check_fits
from jaxlm.sharding.device_memory import available_memory
from jaxlm.terminal.progress import Waiting
from jaxlm.train.spikes import new_history
from jaxlm.train.state import TrainState, abstract_state, init_state, state_from


def check_source(config: Config, initial: Checkpoint | None) -> None:
    """Raises ValueError if --fresh would move aside what --init-from reads."""
    if not config.fresh or initial is None:
        return
    run, source = Path(config.train.run_dir).resolve(), initial.path.resolve()
    if source == run or source.is_relative_to((run / CHECKPOINTS).resolve()):
        raise ValueError(
            f"--init-from {config.init_from} is the run that --fresh moves aside: give "
            "--train.run-dir a new folder"
        )


def initial_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    checkpoints: CheckpointManager,
    dataset: Dataset,
    initial: Checkpoint | None,
) -> tuple[TrainState, bool]:
    """Returns the state to train from, and whether it continues this run."""
    mesh = jax.sharding.get_mesh()
    wanted = abstract_state(config.model, optimizer, mesh)
    spikes = None
    if config.train.skip_spikes:
        spikes = new_history(wanted.step.sharding)
    check_fits(config, wanted.params, wanted.opt_state, available_memory())
    with Waiting("reading the checkpoint"):
        restored = checkpoints.restore(
            wanted.params,
            wanted.opt_state,
            spikes,
            config=config,
            tokenizer_fingerprint=dataset.tokenizer.fingerprint,
            data_fingerprint=dataset.fingerprint,
            step=config.resume_step,
        )
    if restored is not None:
        # At once, as the rows of later steps are dropped when the metrics are opened. A
        # step that cannot be read now may be readable at the next start.
        checkpoints.move_aside_after(restored.step)
        # A Python integer has a weak type, for which the step would compile again.
        step = jax.device_put(np.int32(restored.step), wanted.step.sharding)
        state = TrainState(step, restored.params, restored.opt_state, restored.spikes)
        return state, True
    if initial is None:
        with Waiting("initializing the parameters"):
            state = init_state(config.model, optimizer, config.train.seed, mesh)
            state = dataclasses.replace(state, spikes=spikes)
            return jax.block_until_ready(state), False
    if lines := diff(initial.config, config.model, ignore=NOT_KEPT):
        changes = "; ".join(f"model.{line}" for line in lines)
        raise ValueError(
            f"the model of --init-from {config.init_from} is another one ({changes}): "
            "leave out the --model flags that change it"
        )
    shardings = jax.tree.map(lambda x: x.sharding, wanted.params)
    with Waiting(f"loading the weights of {config.init_from}"):
        _, params = load(initial, dtype=jnp.float32, shardings=shardings)
        state = dataclasses.replace(state_from(params, optimizer), spikes=spikes)
        return jax.block_until_ready(state), False
