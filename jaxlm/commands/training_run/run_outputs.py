"""What a training run writes and prints."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import jax

from jaxlm import tree
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.compatible import is_repeated
from jaxlm.checkpoint.native.run_folder import config_values, has_history
from jaxlm.commands.training_run.hooks import eval_batch_numbers
from jaxlm.config import Config
from jaxlm.data.loader import Dataset
from jaxlm.data.text_record import read_record, write_record
from jaxlm.fields import to_dict
from jaxlm.files.durable import replacing
from jaxlm.ops.linear import compute_dtype
from jaxlm.plan.attention_choice import attention_choices
from jaxlm.report import REPORT
from jaxlm.report.live import LiveReport
from jaxlm.sharding.processes import ALONE, Processes
from jaxlm.terminal.progress import ProgressLine
from jaxlm.train.metrics import MetricsWriter, NoMetrics
from jaxlm.train.sinks import open_sinks
from jaxlm.train.state import TrainState

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_outputs(
    given: Config,
    config: Config,
    state: TrainState,
    resumed: bool,
    dataset: Dataset,
    checkpoints: CheckpointManager,
    processes: Processes = ALONE,
) -> Iterator[tuple[MetricsWriter, ProgressLine]]:
    """Writes the config, the metrics and the report of a run, and shows its progress.

    The report is written during the run, and at the end, however the run ends.

    Args:
      given: the config before it was completed.
      config: the config of the run.
      state: the state that training starts from.
      resumed: whether it continues this run.
      dataset: the text of the run.
      checkpoints: those of the run.
      processes: those of the run, of which the first writes.

    Raises:
      ValueError: if something else is in the place of the run folder now.
    """
    if not processes.is_first:
        yield NoMetrics(), ProgressLine(config.train.steps)
        return
    # From the root, as the steps: a folder above the run's may be renamed.
    settings, run = config.train, checkpoints.run
    if not resumed:
        _keep_earlier_run(config, dataset, checkpoints)
    step, params = int(state.step), tree.count(state.params)
    resume_step = step if resumed else None
    choices = attention_choices(
        *(config.model, settings.batch_size, config.data.sequence_length),
        segments=config.data.segment_attention,
    )

    def write_beginning() -> None:
        # Only reports and messages need these.
        with _or_warned(), replacing(run / "config.json") as file:
            file.write(json.dumps(to_dict(config), indent=2).encode())
        with _or_warned():
            write_record(run, dataset.texts)

    checkpoints.beside_steps(write_beginning)
    sinks = open_sinks(settings.log_to, run, to_dict(config), resume_step)
    writer = MetricsWriter(
        run,
        resume_step=resume_step,
        sinks=[LiveReport(run), *sinks],
        is_own=checkpoints.has_folder,
    )
    progress = ProgressLine(settings.steps)
    progress.note(_opening(given, config, dataset, params, resume_step))
    more = {}
    if resumed and (missing := _missing_rows(writer, step, settings.log_every)):
        more["missing_rows"] = missing
        progress.note(
            f"{writer.path} has no rows of steps {missing[0]} to {missing[1]}: none "
            "were due, or the log is older than the checkpoint"
        )
    with writer, contextlib.closing(progress):
        writer.write(
            "event",
            step,
            event="resume" if resumed else "start",
            params=params,
            attention={kind: choice.to_json() for kind, choice in choices.items()},
            **more,
        )
        yield writer, progress


def _keep_earlier_run(
    config: Config, dataset: Dataset, checkpoints: CheckpointManager
) -> None:
    """Moves another run aside, of which somebody has deleted the steps.

    A run that was killed before its first save, and is started again, only begins
    another log.
    """
    run = checkpoints.run
    if has_history(run) and not (
        is_repeated(config_values(run), config)
        and read_record(run) in (None, dataset.texts)
    ):
        checkpoints.move_all_aside(
            "it has other flags or text, and no checkpoint to go on from"
        )


def _missing_rows(
    writer: MetricsWriter, step: int, log_every: int
) -> tuple[int, int] | None:
    """Returns the first and the last step of which the log of a run has no rows."""
    last = (writer.last_train or {"step": 0})["step"]
    if not log_every or last >= step - step % log_every:
        return None
    return last + 1, step


@contextlib.contextmanager
def _or_warned() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("%s: %s", error.filename, error.strerror)


def _opening(
    given: Config,
    config: Config,
    dataset: Dataset,
    params: int,
    resume_step: int | None,
) -> str:
    """Returns the lines that a run begins with."""
    settings, is_new = config.train, resume_step is None
    lines, warmup = [], config.optimizer.warmup_steps
    if is_new and warmup < given.optimizer.warmup_steps:
        lines.append(
            f"warm-up of {warmup} step{'s' * (warmup > 1)}, a tenth of the run, "
            f"instead of {given.optimizer.warmup_steps}"
        )
    total = dataset.num_eval_batches(settings.batch_size)
    taken = len(eval_batch_numbers(settings, total))
    if is_new and settings.eval_batches is None and taken < total:
        lines.append(
            f"evaluations take {taken} of the {total} batches of held-out text, at "
            "most a tenth of the training time; --train.eval-batches 0 takes all"
        )
    for skipped in settings.skipped_batches:
        lines.append(
            f"batches {skipped.start} to {skipped.stop - 1} are skipped "
            "(--train.skip-batches)"
        )
    traced, first = config.profile.range, (resume_step or 0) + 1
    if traced and not (first < traced.stop and traced.start <= settings.steps):
        lines.append(f"no step of --profile.steps {config.profile.steps} is to come")
    begun = "training for" if is_new else f"resumed at step {resume_step} of"
    weights = ""
    if config.init_from is not None:
        weights = f" from the weights of {config.init_from}"
        if not is_new:
            weights = f", not from the weights of {config.init_from} (--init-from)"
    dtype, run = compute_dtype(config.model.dtype).name, Path(settings.run_dir)
    lines += [
        f"{run}: {params:,} parameters, {dataset.num_train_tokens:,} tokens of text",
        f"{begun} {settings.steps} steps{weights}, on {_devices()} in {dtype}",
        f"follow it in a browser: {run / REPORT}",
    ]
    return "\n".join(lines)


def _devices() -> str:
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    kind = "CPU" if kind == "cpu" else kind
    several = jax.process_count() > 1
    of = f" of {jax.process_count()} processes" * several
    return f"{count} {kind} device{'s' * (count > 1)}{of}"


def how_to_go_on(given: Config, config: Config) -> str:
    """Returns what can be done with a run whose steps are all done.

    Args:
      given: the config before it was completed.
      config: the config of the run.
    """
    run, steps, optimizer = config.train.run_dir, config.train.steps, config.optimizer
    done = f"{run}: all {steps} steps are done"
    if optimizer.first_decayed(steps) is None:
        more = f"to train on: --train.steps {2 * steps}"
        if optimizer.warmup_steps < given.optimizer.warmup_steps:
            more += f" --optimizer.warmup-steps {optimizer.warmup_steps}"
    else:
        done += f", and the learning rate has decayed ({optimizer.schedule})"
        more = "to train its weights further: "
        more += f"--init-from {quote(run)} --train.run-dir NEW"
    return f"{done}\n{more}\nto start over: --fresh"
