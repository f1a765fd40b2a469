"""The training step and the loop, on one device and without a text file."""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from toy_case import make_batch, make_params, toy

from jaxlm import tree
from jaxlm.checkpoint.native.save_error import SaveError
from jaxlm.config import (
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainConfig,
)
from jaxlm.model.transformer import forward
from jaxlm.ops.experts.moe import load_balance_loss, route
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.mesh import make_mesh
from jaxlm.terminal.progress import ProgressLine
from jaxlm.train import loop, run_log
from jaxlm.train.loop import Hooks, fit
from jaxlm.train.metrics import FIELDS, MetricsWriter, read_metrics
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.run_log import RunLog
from jaxlm.train.state import TrainState
from jaxlm.train.step import (
    StepMetrics,
    loss_and_grads,
    loss_sums,
    make_eval_step,
    make_train_step,
)
from jaxlm.train.stopping import NotFinite, StopRequest

MODEL = toy()
PARAMS = jax.tree.map(jnp.asarray, make_params(MODEL))
ROWS, LENGTH = 8, 20
BATCH = make_batch(MODEL, ROWS, LENGTH)


def config_of(**train):
    options = {"steps": 6, "batch_size": ROWS, "log_every": 1, **train}
    return Config(
        model=MODEL,
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
        train=TrainConfig(**options),
    )


def loss_of(train, batch=BATCH):
    def run(params, batch):
        return loss_and_grads(MODEL, train, params, batch)

    loss, grads, total, *_ = jax.jit(run)(PARAMS, batch)
    return (
        float(loss),
        {n: np.asarray(g) for n, g in tree.flatten(grads).items()},
        total,
    )


@functools.partial(jax.jit, static_argnums=0)
def plain(config, params, batch, edits=()):
    """A plain call, with the logits of routers."""
    return forward(
        *(config, params, batch.tokens),
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        edits=edits,
        taps=(Tap("router_logits"),) if config.num_experts else (),
    )


def nll_in_numpy(batch, edits=()):
    """Computes each token's cross-entropy in float64 from the logits of a plain call."""
    logits = np.float64(plain(MODEL, PARAMS, batch, edits).logits)
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    hit = np.take_along_axis(logits, batch.targets[..., None].astype(np.int64), -1)
    return log_z - hit[..., 0], log_z


@pytest.fixture(scope="module")
def whole():
    return loss_of(TrainConfig(batch_size=ROWS))


@pytest.mark.slow
def test_rows_of_one_document_need_no_segments():
    """Padding at the end of a row is not seen by what is before it."""
    length = BATCH.tokens.shape[1]
    padding = np.arange(length) >= length - 5
    index = np.broadcast_to(np.arange(length, dtype=np.int32), BATCH.tokens.shape)
    batch = dataclasses.replace(
        BATCH,
        positions=np.where(padding, 0, index).astype(np.int32),
        segment_ids=np.where(padding, 0, np.ones_like(index)).astype(np.int32),
        loss_weights=np.where(padding, 0, BATCH.loss_weights).astype(np.float32),
    )
    train = TrainConfig(batch_size=ROWS, accumulation_steps=2)
    loss, grads, _ = loss_of(train, batch)
    without = dataclasses.replace(batch, segment_ids=None)
    other_loss, other, _ = loss_of(train, without)
    assert abs(loss - other_loss) < 1e-6
    for name, gradient in grads.items():
        np.testing.assert_allclose(other[name], gradient, atol=1e-6, err_msg=name)


def test_the_loss_is_the_weighted_mean(whole):
    nll, _ = nll_in_numpy(BATCH)
    weights = np.float64(BATCH.loss_weights)
    assert whole[0] == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-6)
    assert float(whole[2]) == pytest.approx(weights.sum())


@pytest.mark.parametrize(
    "options",
    [
        # 7 positions of 2 rows; 20 is not a multiple of 7
        pytest.param(
            {"accumulation_steps": 4, "loss_chunk": 14}, marks=pytest.mark.slow
        ),
        {"accumulation_steps": 2, "loss_chunk": 1},
    ],
)
def test_neither_accumulation_nor_chunks_move_the_result(whole, options):
    """The weights are very uneven: one microbatch has almost none."""
    loss, grads, _ = loss_of(TrainConfig(batch_size=ROWS, **options))
    assert loss == pytest.approx(whole[0], rel=1e-6)
    for name, g in grads.items():
        # f32 sums in another order; seen: 1e-6 of the leaf's largest value.
        error = np.abs(g - whole[1][name]).max() / np.abs(whole[1][name]).max()
        assert error < 5e-6, name


def test_a_mean_of_means_would_be_another_loss(whole):
    """The control of the test above: equal microbatches, unequal weights."""
    nll, _ = nll_in_numpy(BATCH)
    means = []
    for part in range(2):
        w = np.float64(BATCH.loss_weights[part::2])
        means.append((nll[part::2] * w).sum() / w.sum())
    assert abs(np.mean(means) - whole[0]) > 1e-3


@pytest.mark.slow
def test_a_step_can_be_computed_with_edits():
    """Positions are those in the documents of a packed row."""
    edits = (
        Edit("mlp_out", "scale", 0.0, layer=0),
        Edit("resid_post", "add", jnp.ones(MODEL.model_dim), position=[0, 2]),
        Edit("attn_out", "call", jax.tree_util.Partial(jnp.multiply, 0.5), layer=1),
        Edit("mlp_act", "freeze"),
    )
    config = config_of(steps=6, batch_size=ROWS, accumulation_steps=2)
    optimizer = make_optimizer(config.optimizer, 6)
    params = jax.tree.map(jnp.copy, PARAMS)  # the step donates its state
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    _, metrics = make_train_step(config, optimizer)(state, BATCH, edits)
    nll, _ = nll_in_numpy(BATCH, edits)
    weights = np.float64(BATCH.loss_weights)
    wanted = (nll * weights).sum() / weights.sum()
    assert float(metrics.loss) == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted - (nll_in_numpy(BATCH)[0] * weights).sum() / weights.sum()) > 0.01
    fired = np.isin(BATCH.positions, (0, 2)).sum()
    layers = MODEL.num_layers
    assert list(map(int, metrics.hits)) == [2, layers * fired, 2, 2 * layers]


@pytest.mark.slow
def test_z_loss_is_in_the_gradient_and_not_in_the_reported_loss(whole):
    loss, grads, _ = loss_of(TrainConfig(batch_size=ROWS, z_loss=0.1))
    assert loss == pytest.approx(whole[0], rel=1e-6)
    assert np.abs(grads["lm_head/kernel"] - whole[1]["lm_head/kernel"]).max() > 1e-3
    sums = jax.jit(functools.partial(loss_sums, MODEL, TrainConfig(z_loss=0.1)))
    objective, entropy, *_ = sums(PARAMS, BATCH)
    _, log_z = nll_in_numpy(BATCH)
    extra = 0.1 * (log_z**2 * BATCH.loss_weights).sum()
    assert float(objective - entropy) == pytest.approx(extra, rel=1e-4)


EXPERTS = toy(num_experts=4, experts_per_token=2)
EXPERT_PARAMS = jax.tree.map(jnp.asarray, make_params(EXPERTS))


@functools.cache
def experts_run(coefficient, parts):
    train = TrainConfig(
        batch_size=ROWS, load_balance_loss=coefficient, accumulation_steps=parts
    )
    return jax.jit(lambda p, b: loss_and_grads(EXPERTS, train, p, b))


def experts_loss(coefficient=0.0, parts=1, batch=BATCH):
    """Returns loss and gradients of a mixture of experts."""
    loss, grads, *_ = experts_run(coefficient, parts)(EXPERT_PARAMS, batch)
    return float(loss), tree.flatten(grads)


@pytest.mark.slow
def test_the_load_balance_loss_is_in_the_gradient_and_not_in_the_reported_loss():
    @jax.jit
    @jax.grad
    def extra(params):
        logits = plain(EXPERTS, params, BATCH).trace["router_logits"]
        experts = route(logits, 2, True)[1]
        return load_balance_loss(logits, experts, jnp.asarray(BATCH.loss_weights))

    without, grads = experts_loss()
    loss, balanced = experts_loss(0.5)
    assert loss == pytest.approx(without, rel=1e-6)
    wanted = tree.flatten(extra(EXPERT_PARAMS))
    for name, right in wanted.items():
        found = (balanced[name] - grads[name]) / 0.5
        np.testing.assert_allclose(found, right, atol=1e-5, err_msg=name)
    assert np.abs(wanted["layers/moe/router"]).max() > 0.01
    assert not wanted["lm_head/kernel"].any()


@pytest.mark.slow
def test_the_load_of_experts_is_measured():
    """With the load-balance loss and without it, and in parts."""
    tokens = np.asarray(experts_run(0.5, 1)(EXPERT_PARAMS, BATCH)[4])
    out = plain(EXPERTS, EXPERT_PARAMS, BATCH)
    best = np.argsort(-np.asarray(out.trace["router_logits"]), axis=-1)[..., :2]
    counts = [np.bincount(chosen.ravel(), minlength=4) for chosen in best]
    np.testing.assert_array_equal(tokens, counts)
    np.testing.assert_array_equal(experts_run(0.5, 2)(EXPERT_PARAMS, BATCH)[4], tokens)
    config = Config(
        model=EXPERTS,
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(batch_size=ROWS, steps=1),
    )
    optimizer = make_optimizer(config.optimizer, 1)
    params = jax.tree.map(jnp.copy, EXPERT_PARAMS)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    _, metrics = make_train_step(config, optimizer)(state, BATCH)
    most = (tokens / tokens.mean(1, keepdims=True)).max()
    assert metrics.expert_load == pytest.approx(most, rel=1e-6) and most > 1


@pytest.mark.slow
def test_parts_balance_their_experts_by_themselves():
    """It is a mean over the microbatches, weighted by their loss weights."""
    loss, grads = experts_loss(0.5, parts=2)
    assert loss == pytest.approx(experts_loss()[0], rel=1e-6)
    parts, total = [], BATCH.loss_weights.sum()
    for part in range(2):
        batch = jax.tree.map(lambda x, part=part: x[part::2], BATCH)
        share = batch.loss_weights.sum() / total
        parts.append((share, experts_loss(0.5, batch=batch)[1]))
    for name, g in grads.items():
        wanted = sum(share * part[name] for share, part in parts)
        np.testing.assert_allclose(g, wanted, atol=1e-5, err_msg=name)


def test_a_batch_without_weights_is_no_division_by_zero():
    empty = dataclasses.replace(BATCH, loss_weights=0 * BATCH.loss_weights)
    loss, grads, _ = loss_of(TrainConfig(batch_size=ROWS), empty)
    assert loss == 0 and all((g == 0).all() for g in grads.values())


WITHOUT = Hooks(save=lambda state: None)


class Trial:
    """Runs `fit` with everything around it replaced by lists."""

    def __init__(self, folder, config, batches, hooks=None, start=0):
        self.saved, self.folder, self.stream = [], folder, io.StringIO()
        self.shown = []
        progress = ProgressLine(config.train.steps, stream=self.stream)
        update = progress.update
        progress.update = lambda row: (self.shown.append(row["step"]), update(row))
        self.held_out = [make_batch(MODEL, ROWS, LENGTH, seed=s) for s in (50, 51, 52)]
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        params = jax.tree.map(jnp.copy, PARAMS)  # the step donates it
        self.state = TrainState(jnp.int32(start), params, optimizer.init(params))
        hooks = hooks or Hooks(
            save=self.save,
            held_out=lambda: self.held_out,
            sample=lambda _params, step, _is_over: f"text {step}",
        )
        with MetricsWriter(folder) as writer, StopRequest() as stop:
            self.stop = stop
            self.result = fit(
                config,
                optimizer,
                self.state,
                iter(batches),
                hooks,
                writer=writer,
                progress=progress,
                stop=stop,
            )

    def save(self, state):
        params = jax.device_get(state.params)
        self.saved.append((int(state.step), params))


def test_the_loop_steps_evaluates_and_saves_when_it_is_due(tmp_path, compilations):
    config = config_of(eval_every=4, checkpoint_every=4, keep_every=3)
    at_step = []

    def batches():
        for step in range(6):
            at_step.append(len(compilations))
            yield jax.tree.map(jnp.asarray, make_batch(MODEL, ROWS, LENGTH, seed=step))

    trial = Trial(tmp_path, config, batches())
    state, code = trial.result
    assert code == 0 and int(state.step) == 6
    assert [step for step, _ in trial.saved] == [3, 4, 6]
    rows = read_metrics(tmp_path)
    trains = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in trains] == [1, 2, 3, 4, 5, 6]
    evals = [r for r in rows if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [4, 6]
    samples = [(r["step"], r["text"]) for r in rows if r["kind"] == "sample"]
    assert samples == [(6, "text 6")]
    shown = trial.stream.getvalue()
    assert "\n\n--- sample at step 6\ntext 6\n\n" in shown
    assert f"\nstep 4: held-out loss {evals[0]['loss']:.4f}\n" in shown
    # Steps 2, 3 and 4 compile nothing, nor does step 6; the evaluation after step 4
    # does.
    assert at_step[2] == at_step[3]
    assert at_step[4] > at_step[3] and at_step[5] == at_step[4]
    # The input state is donated: its memory is reused for the new one.
    leaves = jax.tree.leaves((trial.state.params, trial.state.opt_state))
    assert all(x.is_deleted() for x in leaves if x.ndim)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


class Later:
    """A number that a device computes in so many seconds, after the one before it."""

    now = device_is_free_at = 0.0

    def __init__(self, value, seconds):
        self._value = value
        self._at = max(Later.device_is_free_at, Later.now) + seconds
        Later.device_is_free_at = self._at

    def block_until_ready(self):
        Later.now = max(self._at, Later.now)
        return self

    def __array__(self, *_):
        self.block_until_ready()
        return np.array(self._value)


def test_rates_hold_for_training_alone_whenever_the_run_is_evaluated(
    tmp_path, monkeypatch
):
    """Also where the device has yet to do steps when the evaluation begins."""
    step_s, pause_s = 0.05, 0.2

    def train_step(state, batch):
        metrics = StepMetrics(Later(1.0, step_s), 1.0, 1.0, 1.0)
        return dataclasses.replace(state, step=state.step + 1), metrics

    def eval_step(params, batch):
        return Later(1.0, pause_s), np.array(1.0)

    monkeypatch.setattr(loop, "make_train_step", lambda *_: train_step)
    monkeypatch.setattr(loop, "make_eval_step", lambda *_: eval_step)
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: Later.now))
    config = config_of(log_every=4, eval_every=3, sample_every=3, steps=8)
    Trial(tmp_path, config, 8 * [BATCH])
    rows = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in rows] == [4, 8]
    for row in rows:
        assert row["step_s"] == pytest.approx(step_s)
        assert row["tokens_per_s"] == pytest.approx(ROWS * LENGTH / row["step_s"])
    assert rows[-1]["wall_s"] == pytest.approx(8 * step_s)


@pytest.mark.parametrize(
    "error", [ValueError("tokens.bin is damaged"), MemoryError("is damaged")]
)
def test_the_steps_before_a_text_that_cannot_be_read_are_saved(
    tmp_path, monkeypatch, error
):
    """Or for which there is no memory."""

    def train_step(state, batch):
        metrics = StepMetrics(1.0, 1.0, 1.0, 1.0)
        return dataclasses.replace(state, step=state.step + 1), metrics

    def batches():
        yield from 3 * [BATCH]
        raise error

    saved = []
    hooks = Hooks(save=lambda state: saved.append(int(state.step)))
    monkeypatch.setattr(loop, "make_train_step", lambda *_: train_step)
    with pytest.raises(type(error), match="is damaged"):
        Trial(tmp_path, config_of(log_every=2), batches(), hooks)
    assert saved == [3]
    rows = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert rows == [2]


@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_written_ends_no_run(
    tmp_path, monkeypatch, caplog, call
):
    def train_step(state, batch):
        metrics = StepMetrics(1.0, 1.0, 1.0, 1.0)
        return dataclasses.replace(state, step=state.step + 1), metrics

    def fail(*_):
        raise JaxRuntimeError("FAILED_PRECONDITION: profile is not a directory")

    saved = []
    hooks = Hooks(save=lambda state: saved.append(int(state.step)))
    monkeypatch.setattr(loop, "make_train_step", lambda *_: train_step)
    for name in ("start_trace", "stop_trace"):
        result = fail if name == call else lambda *_: None
        monkeypatch.setattr(jax.profiler, name, result)
    # The last trace would be written at the end of the run.
    config = config_of(steps=5, checkpoint_every=2)
    config = dataclasses.replace(config, profile=ProfileConfig(steps="3:9"))
    Trial(tmp_path, config, 5 * [BATCH], hooks)
    assert saved == [2, 4, 5]
    (line,) = caplog.messages
    assert "profile: no trace is written (FAILED_PRECONDITION: " in line


@pytest.mark.slow
@pytest.mark.parametrize("stops_after", [5, 20])
def test_an_evaluation_has_two_batches_in_flight(tmp_path, monkeypatch, stops_after):
    """And none after it, also when a stop ends it."""
    in_flight, most = set(), 0

    class Sum:
        def __init__(self):
            in_flight.add(self)

        def block_until_ready(self):
            in_flight.discard(self)

        def __array__(self, *_):
            self.block_until_ready()
            return np.array(1.0)

    def held_out():
        nonlocal most
        for number in range(20):
            most = max(most, len(in_flight))
            if number == stops_after:
                signal.raise_signal(signal.SIGTERM)
            yield BATCH

    def eval_step(params, batch):
        return Sum(), np.array(1.0)

    ended = []
    monkeypatch.setattr(loop, "make_eval_step", lambda *_: eval_step)
    hooks = Hooks(
        save=lambda state: None,
        held_out=held_out,
        sample=lambda *_: ended.append(len(in_flight)) or "",
    )
    config = config_of(eval_every=2, sample_every=2, steps=2)
    batches = [make_batch(MODEL, ROWS, LENGTH, seed=s) for s in range(2)]
    Trial(tmp_path, config, batches, hooks)
    assert most == loop.AHEAD == 2
    assert not in_flight
    assert ended == ([0] if stops_after == 20 else [])


def test_looks_are_rows_at_their_steps_and_at_the_end(tmp_path, monkeypatch):
    def train_step(state, batch):
        metrics = StepMetrics(1.0, 1.0, 1.0, 1.0)
        return dataclasses.replace(state, step=state.step + 1), metrics

    monkeypatch.setattr(loop, "make_train_step", lambda *_: train_step)
    fields = dict.fromkeys(FIELDS["look"], 0.5)
    hooks = Hooks(save=lambda state: None, look=lambda params: fields)
    Trial(tmp_path, config_of(look_every=2, steps=5), 5 * [BATCH], hooks)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "look"]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[0]["induction"] == 0.5


def test_a_step_after_a_slow_one_is_read_at_once(tmp_path, monkeypatch):
    """It would wait on the device with those dispatched after it."""
    config = Config(model=MODEL, data=DataConfig(sequence_length=16))
    with (
        MetricsWriter(tmp_path) as writer,
        contextlib.closing(ProgressLine(9, stream=io.StringIO())) as progress,
    ):
        now = 0.0
        monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: now))
        log = RunLog(config, writer, progress, 1)
        assert log.is_due(2) and not log.is_due(3)
        log.add(2, StepMetrics(*jnp.ones(4)))
        now = run_log.SHOW_SECONDS
        log.read()
        assert log.is_due(3)


def test_a_slow_run_shows_every_step_and_writes_the_rows_that_are_due(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run_log, "SHOW_SECONDS", 0.0)
    trial = Trial(tmp_path, config_of(log_every=4, steps=6), 6 * [BATCH], WITHOUT)
    rows = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in rows] == [4, 6]
    assert trial.shown == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("failing", [[2], [2, 4]])
def test_a_state_is_saved_though_the_save_before_it_has_failed(
    tmp_path, monkeypatch, failing
):
    """The disk may have room again; if not, the run stops then."""

    def train_step(state, batch):
        metrics = StepMetrics(1.0, 1.0, 1.0, 1.0)
        return dataclasses.replace(state, step=state.step + 1), metrics

    begun, full = [], {*failing}

    def save(state):
        if begun and begun[-1] in full:
            full.remove(begun[-1])
            raise SaveError(f"{begun[-1]}")
        begun.append(int(state.step))

    monkeypatch.setattr(loop, "make_train_step", lambda *_: train_step)
    config = config_of(checkpoint_every=2)
    trial = functools.partial(Trial, tmp_path, config, [BATCH] * 6, Hooks(save=save))
    if 4 in failing:
        with pytest.raises(SaveError, match="4"):
            trial()
        assert begun == [2, 4]
    else:
        trial()
        assert begun == [2, 4, 4, 6]
    rows = [r for r in read_metrics(tmp_path) if r.get("event") == "save failed"]
    assert [(r["step"], r["message"]) for r in rows] == [(4, "2")]


@pytest.mark.parametrize("steps", [2, 3])
def test_a_sample_that_fails_does_not_lose_the_state_of_its_step(
    tmp_path, monkeypatch, steps
):
    """Whether a save is due then or not."""

    def train_step(state, batch):
        metrics = StepMetrics(1.0, 1.0, 1.0, 1.0)
        return dataclasses.replace(state, step=state.step + 1), metrics

    def sample(params, step, is_over):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    saved = []
    hooks = Hooks(save=lambda state: saved.append(int(state.step)), sample=sample)
    monkeypatch.setattr(loop, "make_train_step", lambda *_: train_step)
    config = config_of(steps=steps, sample_every=2, checkpoint_every=0)
    with pytest.raises(JaxRuntimeError):
        Trial(tmp_path, config, [BATCH] * steps, hooks)
    assert saved == [2]


def signal_at(number, values):
    """Yields values; before the one of a number, SIGTERM arrives."""
    for index, value in enumerate(values):
        if index == number:
            signal.raise_signal(signal.SIGTERM)
        yield value


def test_a_stop_ends_an_evaluation_between_batches_and_saves(tmp_path):
    taken, saved = [], []

    def held_out():
        for batch in signal_at(3, [BATCH] * 1000):
            taken.append(batch)
            yield batch

    hooks = Hooks(
        save=lambda state: saved.append((int(state.step), len(taken))),
        held_out=held_out,
        sample=lambda *_: pytest.fail("no sample after a stop"),
    )
    trial = Trial(tmp_path, config_of(eval_every=2), 9 * [BATCH], hooks)
    assert trial.result[1] == 75 and saved == [(2, 4)]
    assert not [r for r in read_metrics(tmp_path) if r["kind"] == "eval"]


def test_a_stop_ends_a_sample_and_a_due_save_comes_before_it(tmp_path):
    saved, chunks = [], []

    def sample(params, step, is_over):
        assert saved == [step]
        chunks.extend(
            itertools.takewhile(lambda _: not is_over(), signal_at(3, range(99)))
        )
        return "half a text"

    hooks = Hooks(save=lambda state: saved.append(int(state.step)), sample=sample)
    config = config_of(sample_every=2, checkpoint_every=2)
    trial = Trial(tmp_path, config, 9 * [BATCH], hooks)
    assert trial.result[1] == 75 and saved == [2] and chunks == [0, 1, 2]
    assert not [r for r in read_metrics(tmp_path) if r["kind"] == "sample"]


def test_a_stop_while_a_step_is_awaited_takes_no_other_step(tmp_path):
    state = Trial(tmp_path, config_of(), signal_at(3, 9 * [BATCH]), WITHOUT).result[0]
    assert int(state.step) == 4


def test_a_step_gives_back_the_memory_of_the_old_state():
    config = config_of()
    step = make_train_step(config, make_optimizer(config.optimizer, 6))
    optimizer = make_optimizer(config.optimizer, 6)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    new, metrics = step(state, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert float(metrics.lr) == pytest.approx(1e-2)
    assert int(new.step) == 1
    # The norm of the gradient before it is clipped to 1.
    _, grads, _ = loss_of(config.train)
    norm = math.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads.values()))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("log_every", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(tmp_path, log_every):
    """Also if metrics are read only every few steps: a save reads them first."""
    config = config_of(log_every=log_every, checkpoint_every=2)
    batches = [make_batch(MODEL, ROWS, LENGTH, seed=s) for s in range(6)]
    weights = batches[3].loss_weights * np.float32(np.nan)
    batches[3] = dataclasses.replace(batches[3], loss_weights=weights)
    saved = []
    hooks = Hooks(save=lambda state: saved.append(int(state.step)))
    with pytest.raises(NotFinite, match=r"step 4: loss nan, gradient norm nan"):
        Trial(tmp_path, config, batches, hooks)
    assert saved == [2]
    trains = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert all(math.isfinite(r["loss"]) for r in trains)


@pytest.mark.slow
def test_a_held_out_loss_that_is_not_finite_ends_the_run_and_saves_nothing(tmp_path):
    """The last step's weights are used nowhere else."""
    optimizer = OptimizerConfig(warmup_steps=0, learning_rate=1e37)
    config = dataclasses.replace(config_of(eval_every=1), optimizer=optimizer)
    saved = []
    hooks = Hooks(save=saved.append, held_out=lambda: iter([BATCH]))
    with pytest.raises(NotFinite, match="step 1: held-out loss nan"):
        Trial(tmp_path, config, 6 * [BATCH], hooks)
    assert saved == []
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "eval"] == [1]


@pytest.mark.slow
def test_an_evaluation_is_the_mean_over_the_whole_text(tmp_path):
    """The last batch is mostly padding."""
    trial = Trial(tmp_path, config_of(steps=1), [BATCH])
    (row,) = [r for r in read_metrics(tmp_path) if r["kind"] == "eval"]
    params = jax.tree.map(jnp.asarray, trial.saved[-1][1])
    eval_step = make_eval_step(MODEL, TrainConfig())
    total = weight = 0.0
    for batch in trial.held_out:
        logits = np.float64(plain(MODEL, params, batch).logits)
        for row_logits, targets, weights in zip(
            logits, batch.targets, batch.loss_weights, strict=True
        ):
            for z, target, w in zip(row_logits, targets, weights, strict=True):
                total += float(w) * (np.logaddexp.reduce(z) - z[target])
                weight += float(w)
        _entropy, targets = eval_step(params, batch)
        assert float(targets) == pytest.approx(batch.loss_weights.sum())
    assert row["loss"] == pytest.approx(total / weight, rel=1e-6)
    assert row["targets"] == int(weight)


@pytest.mark.slow
def test_on_a_mesh_of_one_device_the_step_is_the_same(whole):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        loss, grads, _ = loss_of(TrainConfig(batch_size=ROWS))
    assert loss == pytest.approx(whole[0], rel=1e-6)
    for name, g in grads.items():
        np.testing.assert_allclose(g, whole[1][name], rtol=1e-4, atol=1e-6)
