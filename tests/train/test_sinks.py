"""TensorBoard, Weights & Biases and MLflow, the last two as modules of our own."""

import sys
import types
import typing

import pytest

from jaxlm.config import TrainConfig
from jaxlm.train.metrics import MetricsWriter
from jaxlm.train.sinks import SINKS, open_sinks

CONFIG = {"model": {"num_layers": 2}, "train": {"steps": 20, "log_to": ["wandb"]}}
ROW = {
    **{"loss": 2.0, "lr": 0.1, "grad_norm": float("nan"), "tokens_per_s": None},
    **{"mfu": None, "data_wait_s": 0.0, "step_s": 0.1, "tokens": 10, "wall_s": 1.0},
}


def write_rows(run, names, step=10, resume_step=None):
    sinks = open_sinks(names, run, CONFIG, resume_step)
    with MetricsWriter(run, resume_step=resume_step, sinks=sinks) as writer:
        writer.write("event", step, event="start")
        writer.write("train", step, **ROW)
        writer.write("eval", step, loss=1.5, bits_per_byte=2.5, targets=9)
        writer.write("sample", step, prompt="<", text="b")
    return sinks


def test_the_config_knows_the_sinks():
    hint = typing.get_type_hints(TrainConfig)["log_to"]
    assert typing.get_args(typing.get_args(hint)[0]) == tuple(SINKS)


@pytest.mark.parametrize("name", SINKS)
def test_a_missing_package_is_an_error_that_names_the_extra(
    tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, SINKS[name][0], None)
    with pytest.raises(ValueError) as caught:
        open_sinks([name], tmp_path, CONFIG)
    assert f"--train.log-to {name}: " in str(caught.value)
    assert str(caught.value).endswith(f": pip install 'jaxlm[{name}]'")


def test_tensorboard_gets_the_scalars(tmp_path):
    write_rows(tmp_path, ["tensorboard"])
    data = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    for part in (b"train/loss", b"eval/bits_per_byte", b"sample", b"num_layers"):
        assert part in data


class FakeRun:
    """What `wandb.init` returns, as far as it is used."""

    def __init__(self, id, settings, **given):
        self.id, self.given = id or f"new{len(given)}", given
        self.rows, self.axes, self.end = [], [], None

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.rows.append(values)

    def finish(self, exit_code):
        self.end = exit_code


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.runs = []
    module.Html = str
    module.Settings = dict

    def init(**arguments):
        module.runs.append(FakeRun(**arguments))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    return module


def test_wandb_gets_rows_and_goes_on_in_the_same_run(tmp_path, wandb):
    run = tmp_path / "shakespeare"
    write_rows(run, ["wandb"])
    (first,) = wandb.runs
    assert first.given["project"] == "jaxlm" and first.given["name"] == "shakespeare"
    assert first.given["config"] == CONFIG and first.given["resume"] is None
    assert first.axes == [("*", "step")] and first.end == 0
    train, held_out, sample = first.rows
    assert train["train/loss"] == 2.0 and train["step"] == 10
    assert "train/tokens_per_s" not in train
    assert held_out["eval/loss"] == 1.5
    assert sample == {"sample": "<pre>&lt;b</pre>", "step": 10}
    write_rows(run, ["wandb"], step=20, resume_step=10)
    assert wandb.runs[1].id == first.id and wandb.runs[1].given["resume"] == "allow"
    write_rows(run, ["wandb"])  # a new run in the folder is a new run there
    assert wandb.runs[2].given["resume"] is None


def test_a_sink_that_cannot_be_opened_costs_a_line(tmp_path, wandb, caplog):
    def init(**_):
        raise RuntimeError("no API key\nwas found")

    wandb.init = init
    assert write_rows(tmp_path, ["wandb"]) == []
    assert caplog.messages == ["no rows go to wandb: no API key was found"]


class FakeMLflowClient:
    """A client of MLflow that keeps what it is sent."""

    runs: typing.ClassVar = {}

    def get_experiment_by_name(self, name):
        assert name == "jaxlm"

    def create_experiment(self, name):
        return "1"

    def create_run(self, experiment, run_name):
        run = {"params": [], "metrics": [], "texts": {}, "status": "RUNNING"}
        number = f"run{len(self.runs)}"
        self.runs[number] = run
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=number))

    def update_run(self, run, status):
        self.runs[run]["status"] = status

    def log_batch(self, run, metrics=(), params=()):
        self.runs[run]["metrics"] += metrics
        self.runs[run]["params"] += params

    def log_text(self, run, text, file):
        self.runs[run]["texts"][file] = text

    def set_terminated(self, run, status):
        self.runs[run]["status"] = status


@pytest.fixture
def mlflow(monkeypatch):
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.MlflowClient = FakeMLflowClient
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    entities.Param = lambda key, value: (key, value)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(FakeMLflowClient, "runs", {})
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return module


def test_mlflow_gets_rows_and_goes_on_in_the_same_run(tmp_path, mlflow):
    write_rows(tmp_path, ["mlflow"])
    (run,) = FakeMLflowClient.runs.values()
    assert ("train.steps", "20") in run["params"]
    assert ("model.num_layers", "2") in run["params"]
    assert ("train/loss", 2.0, 10) in run["metrics"]
    assert ("eval/bits_per_byte", 2.5, 10) in run["metrics"]
    assert run["texts"] == {"samples/step_10.txt": "<b"}
    assert run["status"] == "FINISHED"
    write_rows(tmp_path, ["mlflow"], step=20, resume_step=10)
    assert len(FakeMLflowClient.runs) == 1
    assert ("train/loss", 2.0, 20) in run["metrics"] and len(run["params"]) == 3
    write_rows(tmp_path, ["mlflow"])
    assert len(FakeMLflowClient.runs) == 2
