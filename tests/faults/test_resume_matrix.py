"""Stopped and resumed, the run is the same, for each kind of state and each step.

In this process, on one small model. Of two epochs of a text, of kills and of whole
commands, `test_resume.py` has the rest of the matrix.
"""

import os
import time

import jax
import numpy as np
import pytest
from in_process_case import STEPS, InProcess, batch_of, config_of, step_of

from jaxlm import tree
from jaxlm.train import loop
from jaxlm.train.metrics import read_metrics


@pytest.fixture(autouse=True)
def one_program(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", step_of)


BAD = {number: batch_of(number, np.nan) for number in (4, 5, 9)}
CONFIGS = {
    "float32": config_of(),
    "bfloat16": config_of({"dtype": "bfloat16"}, accumulation_steps=2),
    "skipped steps": config_of(skip_spikes=3),
    "lion": config_of(optimizer={"name": "lion"}),
    "adafactor": config_of(optimizer={"name": "adafactor"}, skip_batches=("3:6",)),
    "muon": config_of(optimizer={"name": "muon"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_stopped_after_a_step_it_is_the_same(tmp_path, name):
    bad = BAD if name == "skipped steps" else {}
    straight, stopped = (InProcess(tmp_path / n, CONFIGS[name], bad) for n in "ab")
    assert straight.train() == 0
    each = name in ("float32", "skipped steps")
    for step in range(1, STEPS, 1 if each else 5):
        assert stopped.train(stop_at=step) == 75
    assert stopped.train() == 0
    course = straight.course()
    assert course == stopped.course()
    assert len(course["train"]) == STEPS
    assert len(course["step skipped"]) == len(bad)


def lost_ulp(state):
    leaf = np.array(tree.flatten(state.params)["layers/mlp/down"])
    leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(np.inf))
    params = tree.replace(state.params, "layers/mlp/down", jax.numpy.asarray(leaf))
    return loop.TrainState(state.step, params, state.opt_state, state.spikes)


def lost_moments(state):
    opt_state = tree.map_with_name(
        lambda name, x: x * 0 if "/mu/" in name else x, state.opt_state
    )
    return loop.TrainState(state.step, state.params, opt_state, state.spikes)


def lost_history(state):
    spikes = jax.tree.map(lambda x: x * 0, state.spikes)
    return loop.TrainState(state.step, state.params, state.opt_state, spikes)


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, lost_ulp, lost_moments, lost_history])
def test_what_is_lost_shows(tmp_path, change):
    """Also the history of spikes alone, by the learning rate after a skipped step."""
    straight, stopped = (
        InProcess(tmp_path / n, CONFIGS["skipped steps"], BAD) for n in "ab"
    )
    assert straight.train() == 0 and stopped.train(stop_at=6) == 75
    assert stopped.train(change=change) == 0
    assert (straight.course() == stopped.course()) == (change is None)


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    """An hour with each look at it. The newest step is the one with the largest number."""
    straight, other = (InProcess(tmp_path / n, config_of()) for n in "ab")
    assert straight.train() == 0
    hours = iter(range(10**9))
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(time, "time", lambda: now - 3600 * next(hours))
        assert other.train(stop_at=5) == 75
        assert other.train(stop_at=7) == 75
    os.utime(other.folder / "checkpoints" / "7", (1, 1))
    assert other.train() == 0
    assert "resume" not in other.shown.getvalue()
    assert straight.course() == other.course()
    rows = [row for row in read_metrics(other.folder) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    walls = [row["wall_s"] for row in rows]
    assert walls == sorted(walls) and walls[0] > 0 and walls[-1] < 600
    assert all(0 < row["step_s"] < 600 and row["data_wait_s"] >= 0 for row in rows)
