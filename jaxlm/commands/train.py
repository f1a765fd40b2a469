"""Train a language model: from a config to a run folder.

`train` runs everything: it reads the text, makes or restores the state, runs the loop
and writes the run folder. It wires together parts of jaxlm that are independent of
each other.
"""

import sys
from shlex import quote

import jax

from jaxlm.checkpoint.certificate import fingerprint
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.compatible import shared_environment
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.process import STARTED, use_compile_cache
from jaxlm.commands.training_run.completed_config import completed
from jaxlm.commands.training_run.hooks import make_hooks
from jaxlm.commands.training_run.initial_state import check_source, initial_state
from jaxlm.commands.training_run.run_outputs import how_to_go_on, run_outputs
from jaxlm.config import Config
from jaxlm.data.loader import Dataset, batches, open_dataset
from jaxlm.data.text_record import read_record
from jaxlm.fields import named_values, to_dict
from jaxlm.report import REPORT
from jaxlm.sharding import rules
from jaxlm.sharding.mesh import check_batch, make_mesh
from jaxlm.sharding.processes import ALONE, Processes, connect
from jaxlm.terminal.exit_codes import EXIT_DONE
from jaxlm.terminal.interrupts import Interrupts
from jaxlm.terminal.progress import Waiting
from jaxlm.train.loop import Hooks, due_kinds, fit
from jaxlm.train.metrics import kinds_at
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.stopping import SIGNAL_CODES, StopRequest

# Parts of a config that may differ between processes: files may lie elsewhere, and the
# text and the weights that they hold are compared.
_OF_ONE_PROCESS = ("data", "init_from", "processes", "profile")


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
    check_batch(config, jax.sharding.get_mesh())
    check_source(config, initial)
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
        dataset = _read_text(config, initial, checkpoints)
        config = completed(given, dataset.tokenizer)
        source = None if checkpoints.steps() else initial
        _check_same_run(config, dataset, source, processes)
        hooks = make_hooks(config, dataset, checkpoints)

        # Make or restore the state.
        optimizer = make_optimizer(config.optimizer, settings.steps)
        state, resumed = initial_state(config, optimizer, checkpoints, dataset, initial)
        step = int(state.step)
        missing = _missing_rows(config, hooks, step, processes) if resumed else set()
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
        outputs = run_outputs(
            given, config, state, resumed, dataset, checkpoints, processes
        )
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
    print(f"{settings.run_dir}/{REPORT}\n{sample_command} {quote(settings.run_dir)}")
    return code


def _read_text(
    config: Config, initial: Checkpoint | None, checkpoints: CheckpointManager
) -> Dataset:
    """Opens the text, as the run has begun with it; may train a tokenizer."""
    tokenizer = None if initial is None else initial.tokenizer()
    began = read_record(checkpoints.run) if checkpoints.steps() else None
    with Waiting("reading the text", in_logs=False):
        return open_dataset(config.data, tokenizer, seed=config.train.seed, began=began)


def _missing_rows(
    config: Config, hooks: Hooks, step: int, processes: Processes
) -> set[str]:
    """Returns the kinds of rows that a stop while this step was evaluated left out."""
    written = processes.of_first(
        "rows", lambda: [*kinds_at(config.train.run_dir, step)]
    )
    return due_kinds(config.train, hooks, step).difference(written)


def _check_same_run(
    config: Config,
    dataset: Dataset,
    source: Checkpoint | None,
    processes: Processes,
) -> None:
    """Raises ValueError if another process has other weights, text, settings or flags.

    Each of them would train its own model, or wait for what the others do not do.
    """
    if processes.count == 1:
        return
    own = {n: v for n, v in to_dict(config).items() if n not in _OF_ONE_PROCESS}
    own = named_values(own)
    own |= shared_environment()
    own["the fingerprint of the text"] = dataset.fingerprint
    own["the fingerprint of --init-from"] = source and fingerprint(source)
    for index, other in enumerate(processes.gather("reading the config", own)):
        for name, value in other.items():
            # Another version may have other settings.
            if value != own.get(name):
                raise ValueError(
                    f"{name} is {value} in process {index} and {own.get(name)} in "
                    f"process {processes.index}: start all with the same command, "
                    "environment and text"
                )


def _again(config: Config, code: int) -> str:
    """Returns how to continue a run that has ended with an exit code."""
    if not code:
        return ""
    without = " without --fresh" if config.fresh else ""
    if config.resume_step is not None:
        without = " without --resume-step"
    return f"; the same command{without} continues"
