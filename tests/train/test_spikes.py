"""Steps that are a spike or not finite are not applied, and change nothing."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_process_case import (
    InProcess,
    batch_of,
    config_of,
    new_state,
    step_of,
)

from jaxlm.checkpoint.native.integrity import state_hash
from jaxlm.train import loop
from jaxlm.train.metrics import read_metrics
from jaxlm.train.spikes import WINDOW, SpikeHistory, after_step, new_history
from jaxlm.train.stopping import NotFinite

CONFIG = config_of(skip_spikes=2)
BAD = batch_of(99, np.nan)


@pytest.fixture(autouse=True)
def one_program(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", step_of)


def after(batches):
    state, lines = new_state(CONFIG), []
    for batch in batches:
        state, metrics = step_of(CONFIG)(state, batch)
        lines.append((int(metrics.skipped_in_a_row), float(metrics.lr)))
    return state, lines


def learned(state):
    return state_hash({"params": state.params, "opt_state": state.opt_state})


def test_a_skipped_step_leaves_the_state_as_if_its_batch_had_never_been():
    """Bit for bit, with the schedule of the learning rate; several in a row too."""
    good = [batch_of(number) for number in range(4)]
    straight, rates = after(good)
    state, lines = after([good[0], BAD, BAD, good[1], BAD, *good[2:]])
    assert learned(state) == learned(straight)
    assert [n for n, _ in lines] == [0, 1, 2, 0, 1, 0, 0]
    assert [lr for n, lr in lines if not n] == [lr for _, lr in rates]
    assert len({lr for _, lr in rates}) > 2
    assert int(state.step) == 7 and int(state.spikes.skipped) == 3


@pytest.mark.slow
def test_without_it_one_such_step_leaves_nothing_finite():
    state = dataclasses.replace(new_state(CONFIG), spikes=None)
    state, metrics = step_of(CONFIG)(state, BAD)
    assert metrics.skipped_in_a_row is None
    assert not np.isfinite(jax.tree.leaves(state.params)[0]).any()


def test_the_rule_finds_what_a_plain_one_finds():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 0.1, (400, 2)).astype(np.float32)
    values[[5, 100, 101, 102, 250], 0] += [9.0, 9.0, 2.0, 1.5, 0.3]
    values[[150, 300], 1] += [2.0, 1.5]
    values[[160, 161], 0] = np.nan, np.inf
    values[170, 1] = -np.inf

    def body(history, pair):
        history = after_step(history, *pair)
        return history, history.in_a_row > 0

    _, found = jax.jit(lambda x: jax.lax.scan(body, new_history(), x))(values)
    taken, wanted = collections.deque(maxlen=128), []
    for pair in np.float64(values):
        is_spike = not np.isfinite(pair).all()
        if len(taken) >= 64 and not is_spike:
            mean, deviation = np.mean(taken, 0), np.std(taken, 0, ddof=1)
            is_spike = bool((pair > mean + 6 * deviation).any())
        wanted.append(is_spike)
        if not is_spike:
            taken.append(pair)
    assert found.tolist() == wanted
    # None at step 5, before there is a history. That step hides those from 100 on no
    # more than it must: the ring holds it until step 133.
    assert {100, 160, 161, 170, 300} <= set(np.flatnonzero(found).tolist())


def near(value):
    """A history as if losses and gradient norms had been near a value for long."""
    values = np.linspace(0.9, 1.1, WINDOW, dtype=np.float32) * value
    return SpikeHistory(*map(jnp.asarray, (values, values, WINDOW, 0, 0)))


@pytest.mark.slow
def test_a_finite_spike_is_skipped_and_reported(tmp_path):
    """Four steps far above the history: the third in a row is one too many."""
    run = InProcess(tmp_path, CONFIG)

    def lowered(state):
        return dataclasses.replace(state, spikes=near(0.01))

    with pytest.raises(NotFinite, match=r"step 3: loss [0-9.]+, .*: a spike, after 2"):
        run.train(change=lowered)
    rows = [r for r in read_metrics(tmp_path) if r.get("event") == "step skipped"]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all(1 < r["loss"] < 99 and 0.1 < r["grad_norm"] < 99 for r in rows)
    assert run.shown.getvalue().count(": a spike, so this step is not applied") == 2
    # Between high values the same steps are none.
    assert run.train(change=lambda s: dataclasses.replace(s, spikes=near(50.0))) == 0


@pytest.mark.slow
def test_stopped_among_them_it_is_the_same_run(tmp_path):
    """`test_resume_matrix.py` stops after each step."""
    bad = {5: BAD, 6: BAD, 9: BAD}
    straight, stopped = (InProcess(tmp_path / n, CONFIG, bad) for n in "ab")
    assert straight.train() == 0
    assert stopped.train(stop_at=5) == 75
    assert stopped.train() == 0
    assert straight.course() == stopped.course()
    assert [row[0] for row in straight.course()["step skipped"]] == [5, 6, 9]


@pytest.mark.slow
def test_the_limit_holds_across_a_stop(tmp_path):
    bad = dict.fromkeys((5, 6, 7), BAD)
    run = InProcess(tmp_path, CONFIG, bad)
    assert run.train(stop_at=6) == 75
    with pytest.raises(NotFinite, match=r"step 7: loss nan.* not finite, after 2"):
        run.train()


@pytest.mark.slow
def test_it_can_be_turned_on_but_not_off_again(tmp_path):
    run = InProcess(tmp_path, config_of(), {6: BAD})
    assert run.train(stop_at=4) == 75
    with pytest.raises(NotFinite, match="step 6: loss nan"):
        run.train()
    run.config = CONFIG
    assert run.train(stop_at=8) == 75
    run.config = config_of()
    with pytest.raises(ValueError, match=r"train\.skip_spikes: 2 -> 0"):
        run.train()
    run.config = config_of(skip_spikes=5)
    assert run.train() == 0
