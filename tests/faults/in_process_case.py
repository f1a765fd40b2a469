"""Tiny runs of the training loop with checkpoints, in this process: no children."""

import dataclasses
import functools
import io
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from toy_case import make_batch, make_params, toy

from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.integrity import state_hash
from jaxlm.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxlm.terminal.progress import ProgressLine
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.train.loop import Hooks, fit
from jaxlm.train.metrics import MetricsWriter, read_metrics
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.spikes import new_history
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_train_step
from jaxlm.train.stopping import StopRequest

ROWS, LENGTH, STEPS = 4, 12, 12
SAME = {"data_fingerprint": "data"}


def config_of(model=None, optimizer=None, **train):
    return Config(
        model=toy(num_layers=1, **(model or {})),
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(
            warmup_steps=3, learning_rate=1e-2, **(optimizer or {})
        ),
        train=TrainConfig(
            **{"steps": STEPS, "batch_size": ROWS, "log_every": 1, **train}
        ),
    )


@functools.cache
def _step_of(config):
    return make_train_step(config, make_optimizer(config.optimizer, STEPS))


def step_of(config, _optimizer=None):
    """One program for all runs of a config; `fit` would compile it in each."""
    return _step_of(config)


def batch_of(number, factor=1.0):
    """The batch of a step, from 1; `factor` times its loss weights."""
    batch = make_batch(toy(), ROWS, LENGTH, seed=number)
    weights = batch.loss_weights * np.float32(factor)
    return dataclasses.replace(batch, loss_weights=weights)


def new_state(config, params=None):
    optimizer = make_optimizer(config.optimizer, STEPS)
    params = jax.tree.map(jnp.asarray, params or make_params(config.model))
    spikes = new_history() if config.train.skip_spikes else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), spikes)


def saving(manager, config):
    """Returns `Hooks.save` of a manager."""

    def save(state):
        manager.save(
            *(int(state.step), state.params, state.opt_state, state.spikes),
            **{"config": config, "tokenizer": ByteTokenizer(), **SAME},
        )

    return save


class InProcess:
    """A run in a folder that trains on `batches` (by number; others: `batch_of`)."""

    def __init__(self, folder, config, batches=None):
        self.folder, self.config, self.batches = folder, config, batches or {}
        self.shown = io.StringIO()

    def train(self, stop_at=None, change=None, **options):
        """Trains on; returns the exit code.

        `stop_at`: SIGTERM arrives before that step. `change` is applied to the state
        that was restored.
        """
        config, report = self.config, lambda line: print(line, file=self.shown)
        with (
            CheckpointManager(self.folder, report=report) as manager,
            StopRequest() as stop,
        ):
            state = self._restored(manager, **options) or new_state(config)
            first = int(state.step)
            state = change(state) if change else state

            def batches():
                for step in range(first + 1, STEPS + 1):
                    if step == stop_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    number = config.train.batch_of(step)
                    yield self.batches.get(number) or batch_of(number)

            with MetricsWriter(self.folder, resume_step=first or None) as writer:
                state, code = fit(
                    *(config, make_optimizer(config.optimizer, STEPS), state),
                    *(batches(), Hooks(save=saving(manager, config))),
                    **{"writer": writer, "stop": stop},
                    progress=ProgressLine(STEPS, stream=self.shown),
                )
            manager.wait()
        self.final = {
            "state": state_hash(state),
            "learned": state_hash({"params": state.params, "opt": state.opt_state}),
        }
        return code

    def _restored(self, manager, **options):
        like = jax.eval_shape(functools.partial(new_state, self.config))
        if like.spikes is not None:
            like = dataclasses.replace(like, spikes=new_history())
        restored = manager.restore(
            *(like.params, like.opt_state, like.spikes),
            **{"config": self.config, **SAME, **options},
            tokenizer_fingerprint=ByteTokenizer().fingerprint,
        )
        if restored is None:
            return None
        return TrainState(
            *(jnp.int32(restored.step), restored.params),
            *(restored.opt_state, restored.spikes),
        )

    def course(self):
        """All that must be bitwise equal in two runs of a config."""
        rows = read_metrics(self.folder)
        numbers = ("loss", "grad_norm", "lr")
        return self.final | {
            kind: [
                (r["step"], *(float(r[n]).hex() for n in numbers if n in r))
                for r in rows
                if r.get("event", r["kind"]) == kind
            ]
            for kind in ("train", "step skipped")
        }
