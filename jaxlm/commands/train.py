"""Train a language model: from a config to a run folder.

`train` runs everything: it reads the text, makes or restores the state, runs the loop
and writes the run folder. It wires together parts of jaxlm that are independent of
each other.
"""

import sys

import jax

from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.process import STARTED, use_compile_cache
from jaxlm.commands.training_run.completed_config import completed
from jaxlm.commands.training_run.hooks import make_hooks
from jaxlm.commands.training_run.initial_state import initial_state
from jaxlm.commands.training_run.run_outputs import how_to_go_on, run_outputs
from jaxlm.config import Config
from jaxlm.data.loader import Dataset, batches, open_dataset
from jaxlm.data.text_record import read_record
from jaxlm.fields import named_values, to_dict
from jaxlm.report.live import REPORT
from jaxlm.sharding import rules
from jaxlm.sharding.mesh import check_batch, make_mesh
from jaxlm.sharding.processes import ALONE, Processes, connect
from jaxlm.terminal.exit_codes import EXIT_DONE
from jaxlm.terminal.interrupts import Interrupts
from jaxlm.terminal.progress import Waiting
from jaxlm.train.loop import due_kinds, fit
from jaxlm.train.metrics import kinds_at
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.stopping import SIGNAL_CODES, StopRequest


def main(
    config: Config,
    initial: Checkpoint | None,
    *,
    sample_command: str = "jaxlm sample",
) -> int:
    """Calls `train` on the devices of the config's mesh; returns the exit code."""
    if config.train.compile_cache:
        use_compile_cache()
    with (
        connect(config.processes) as processes,
        jax.set_mesh(make_mesh(config.mesh)),
    ):
        return train(config, initial, sample_command, processes)


def train(
    config: Config,
    initial: Checkpoint | None = None,
    sample_command: str = "jaxlm sample",
    processes: Processes = ALONE,
) -> int:
    """Trains until the last step or until a stop is requested, on the current mesh.

    Args:
      config: the whole run.
      initial: the checkpoint whose parameters training starts from; None initializes
        them.
      sample_command: the command printed at the end for sampling from the run.
      processes: those of the run.

    Returns:
      The exit code (`terminal/exit_codes.py`).

    Raises:
      ValueError: if the mesh, the text, the run folder, the checkpoint or the prompt of
        the samples cannot be used.
      NotFinite: at the first step whose loss or gradient is not finite.
    """
    given, settings = config, config.train
    check_batch(settings, config.data.sequence_length, jax.sharding.get_mesh())
    checkpoints = CheckpointManager(
        settings.run_dir,
        settings.keep,
        settings.keep_every,
        fresh=config.fresh,
        processes=processes,
    )
    stop = StopRequest(settings.max_minutes, processes)
    # Until the first step there is nothing to save, so a signal ends the run.
    with checkpoints, Interrupts(SIGNAL_CODES):
        # Read the text.
        tokenizer = None if initial is None else initial.tokenizer()
        began = read_record(checkpoints.run) if checkpoints.steps() else None
        with Waiting("reading the text", in_logs=False):
            dataset = open_dataset(
                config.data, tokenizer, seed=settings.seed, began=began
            )
        config = completed(given, dataset.tokenizer)
        _check_same_run(config, dataset, processes)
        hooks = make_hooks(config, dataset, checkpoints)

        # Make or restore the state.
        optimizer = make_optimizer(config.optimizer, settings.steps)
        state, resumed = initial_state(config, optimizer, checkpoints, dataset, initial)
        step = int(state.step)
        # What a stop during the evaluation of this step has left out.
        due = due_kinds(settings, hooks, step) if resumed else set()
        missing = due.difference(
            processes.of_first("rows", lambda: [*kinds_at(settings.run_dir, step)])
        )
        if resumed and step >= settings.steps and not missing:
            print(how_to_go_on(given, config))
            return EXIT_DONE

        # Train.
        sharding = rules.batch_sharding(jax.sharding.get_mesh())
        rows = batches(
            dataset,
            settings.batch_size,
            step,
            sharding,
            config.data.prefetch,
            settings.batch_of,
        )
        outputs = run_outputs(given, config, state, resumed, dataset, processes)
        processes.gather("start of the first step")
        with outputs as (writer, progress), stop:
            state, code = fit(
                config,
                optimizer,
                state,
                rows,
                hooks,
                writer=writer,
                progress=progress,
                stop=stop,
                missing=missing,
                started=STARTED,
                processes=processes,
            )
            with Waiting("saving", in_logs=False):
                checkpoints.wait()
    print(f"saved at step {int(state.step)}{_again(config, code)}", file=sys.stderr)
    print(f"{settings.run_dir}/{REPORT}\n{sample_command} {settings.run_dir}")
    return code


def _check_same_run(config: Config, dataset: Dataset, processes: Processes) -> None:
    """Raises ValueError if another process has another text or another config."""
    parts = {n: to_dict(getattr(config, n)) for n in ("model", "mesh", "optimizer")}
    own = named_values({**parts, "train": to_dict(config.train)})
    own["the fingerprint of the text"] = dataset.fingerprint
    for index, other in enumerate(processes.gather("reading the config", own)):
        for name, value in other.items():
            if value != own[name]:
                raise ValueError(
                    f"{name} is {value} in process {index} and {own[name]} in process "
                    f"{processes.index}: start all with the same command and text"
                )


def _again(config: Config, code: int) -> str:
    """Returns how to continue a run that has ended with an exit code."""
    if not code:
        return ""
    without = " without --fresh" if config.fresh else ""
    if config.resume_step is not None:
        without = " without --resume-step"
    return f"; the same command{without} continues"
