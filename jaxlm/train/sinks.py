"""Where the rows of a run can go besides `metrics.jsonl`: `train.log_to`.

Each sink needs an extra of the same name. Where it keeps a run under an id, the id is
kept in the run folder, so that a resumed run continues there.
"""

import html
import importlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.fields import named_values
from jaxlm.terminal.printable import error_line
from jaxlm.terminal.progress import Waiting
from jaxlm.train.metrics import Sink

# Sent together, as a request takes longer than a step.
MLFLOW_SECONDS, MLFLOW_METRICS = 5.0, 500
# The most that a request may have, and the longest value.
MLFLOW_PARAMS, MLFLOW_CHARACTERS = 100, 6000

logger = logging.getLogger(__name__)


def open_sinks(
    names: Sequence[str],
    run_dir: Path | str,
    config: Mapping[str, Any],
    resume_step: int | None = None,
) -> list[Sink]:
    """Opens sinks by name; one that fails is left out with a warning.

    Args:
      names: of `SINKS`.
      run_dir: folder of the run; its name is that of the run there.
      config: the config of the run, as in `config.json`.
      resume_step: the step after which the run is resumed; None starts a new one.

    Raises:
      ValueError: if the package of a sink is not installed; names the extra.
    """
    sinks = []
    for name in names:
        module, make = SINKS[name]
        try:
            package = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"--train.log-to {name}: {error}: pip install 'jaxlm[{name}]'"
            ) from None
        try:
            with Waiting(f"opening {name}"):
                sinks.append(make(package, Path(run_dir), config, resume_step))
        except Exception as error:
            # A service that does not answer must not keep a model from training.
            logger.warning("no rows go to %s: %s", name, error_line(error))
    return sinks


class TensorBoard:
    """Writes events to `RUN/tensorboard/`."""

    def __init__(self, package: Any, run: Path, config: Any, resume_step: int | None):
        # Hides events of an earlier start for steps that will be repeated.
        purge = 0 if resume_step is None else resume_step + 1
        self._board = package.SummaryWriter(
            str(run / "tensorboard"), purge_step=purge, flush_secs=10
        )
        text = json.dumps(config, indent=2)
        self._board.add_text("config", f"```\n{text}\n```", resume_step or 0)

    def write(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "sample":
            self._board.add_text("sample", row["prompt"] + row["text"], row["step"])
        for name, value in _numbers(row):
            self._board.add_scalar(name, value, row["step"])

    def close(self, failed: bool) -> None:
        self._board.close()


class Wandb:
    """Logs to Weights & Biases, whose own variables (WANDB_MODE ...) set the rest.

    The horizontal axis is the field `step`: a resumed run repeats the steps after its
    checkpoint, which wandb's own counter does not allow.
    """

    def __init__(self, package: Any, run: Path, config: Any, resume_step: int | None):
        kept = run / "wandb" / "run_id"
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = _kept_id(kept, resume_step)
        self._html = package.Html
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", "jaxlm"),
            name=os.environ.get("WANDB_NAME", run.name),
            dir=run,
            id=found,
            resume=None if found is None else "allow",
            config=config,
            # It must not take the terminal from the progress line.
            settings=package.Settings(console="off", quiet=True),
        )
        kept.write_text(self._run.id)
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        values = dict(_numbers(row))
        if row["kind"] == "sample":
            text = html.escape(row["prompt"] + row["text"])
            values["sample"] = self._html(f"<pre>{text}</pre>")
        if values:
            self._run.log({**values, "step": row["step"]})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """Logs to MLflow, whose own variables (MLFLOW_TRACKING_URI ...) set the rest."""

    def __init__(self, package: Any, run: Path, config: Any, resume_step: int | None):
        self._entities = importlib.import_module("mlflow.entities")
        self._client = package.MlflowClient()
        self._metrics: list[Any] = []
        self._sent = time.monotonic()
        kept = run / "mlflow" / "run_id"
        found = _kept_id(kept, resume_step)
        if found is not None:
            self._client.update_run(found, status="RUNNING")
            self._id = found
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxlm")
        experiment = self._client.get_experiment_by_name(name)
        number = (
            experiment.experiment_id
            if experiment is not None
            else self._client.create_experiment(name)
        )
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(self._id)
        params = [
            self._entities.Param(key, str(value)[:MLFLOW_CHARACTERS])
            for key, value in named_values(config).items()
        ]
        for start in range(0, len(params), MLFLOW_PARAMS):
            part = params[start : start + MLFLOW_PARAMS]
            self._client.log_batch(self._id, params=part)

    def write(self, row: Mapping[str, Any]) -> None:
        now = int(1000 * time.time())
        self._metrics += [
            self._entities.Metric(name, value, now, row["step"])
            for name, value in _numbers(row)
        ]
        if row["kind"] == "sample":
            file = f"samples/step_{row['step']}.txt"
            self._client.log_text(self._id, row["prompt"] + row["text"], file)
        due = time.monotonic() - self._sent > MLFLOW_SECONDS
        if due or len(self._metrics) >= MLFLOW_METRICS:
            self._send()

    def _send(self) -> None:
        self._client.log_batch(self._id, metrics=self._metrics)
        self._metrics, self._sent = [], time.monotonic()

    def close(self, failed: bool) -> None:
        self._send()
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


SINKS: Mapping[str, tuple[str, Any]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", Wandb),
    "mlflow": ("mlflow", MLflow),
}
"""Name -> the module that it needs, and its class."""


def _kept_id(path: Path, resume_step: int | None) -> str | None:
    """Returns the id under which a resumed run is known; None for a new one."""
    if resume_step is None or not path.exists():
        return None
    return path.read_text().strip() or None


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a training or evaluation row, such as `train/loss`."""
    for name, value in row.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if row["kind"] in ("train", "eval") and number and name != "step":
            yield f"{row['kind']}/{name}", value
