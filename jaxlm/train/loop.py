"""The training loop: any iterator of batches in, a trained state out."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxlm.config import Config
from jaxlm.ops.linear import compute_dtype
from jaxlm.progress import ProgressLine
from jaxlm.train.metrics import MetricsWriter
from jaxlm.train.state import TrainState
from jaxlm.train.step import StepMetrics, make_eval_step, make_train_step
from jaxlm.train.stopping import EXIT_DONE, NotFinite, StopRequest
from jaxlm.train.throughput import flops_per_token, peak_flops
from jaxlm.types import Batch, Params


@dataclass(frozen=True)
class Hooks:
    """What the loop calls but does not know how to do."""

    save: Callable[[TrainState], None]
    """Saves a state whose loss and gradient are finite."""
    held_out: Callable[[], Iterable[Batch]] | None = None
    """Batches of one pass over the held-out text; None: no evaluation."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of a held-out token, for bits per byte."""
    sample: Callable[[Params, int], str] | None = None
    """Text from the parameters at a step; None: no samples."""


def fit(
    config: Config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batches: Iterator[Batch],
    hooks: Hooks,
    *,
    writer: MetricsWriter,
    progress: ProgressLine,
    stop: StopRequest,
    started: float | None = None,
) -> tuple[TrainState, int]:
    """Trains to `config.train.steps`, or until `stop` asks to end.

    Args:
      config: the whole run.
      state: taken over; it must not be used afterwards.
      batches: one batch a step, from the step of `state` on, laid out on the mesh.
      started: `time.monotonic()` when the process began; None takes now.

    Returns:
      The state, saved, and the exit code (`stopping.py`).

    Raises:
      NotFinite: with the first step whose loss or gradient is not finite. What the
        run saved before it is untouched.
    """
    train = config.train
    train_step = make_train_step(config, optimizer)
    evaluate = _evaluator(config, hooks)
    first = int(state.step)
    started = time.monotonic() if started is None else started
    log = _Log(config, writer, progress, first)
    saved_at, code = time.monotonic(), EXIT_DONE

    for step in range(first + 1, train.steps + 1):
        # Step.
        batch = log.timed_next(batches)
        state, metrics = train_step(state, batch)
        log.add(step, metrics)
        last = step == train.steps

        # Read: the only place where the host waits for the device.
        requested = stop.exit_code()
        save = last or requested is not None or _due(step, train.checkpoint_every)
        minutes = (time.monotonic() - saved_at) / 60
        save |= train.checkpoint_minutes > 0 and minutes >= train.checkpoint_minutes
        if _due(step, train.log_every) or save or step == first + 1:
            log.read()
        if step == first + 1:
            ready = time.monotonic() - started
            writer.write("event", step, event="first step", since_start_s=ready)
            progress.note(f"first step done {ready:.1f} s after the start")

        # Look.
        if evaluate and (last or _due(step, train.eval_every)):
            with log.paused():
                evaluate(state.params, step, writer, progress)
        if (
            hooks.sample
            and train.sample_every
            and (last or _due(step, train.sample_every))
        ):
            with log.paused():
                text = hooks.sample(state.params, step)
                writer.write("sample", step, text=text, prompt=train.sample_prompt)
                progress.note(f"step {step}: sample\n{train.sample_prompt}{text}")

        # Save.
        if save:
            with log.paused():
                log.read()
                hooks.save(state)
            saved_at = time.monotonic()
        if requested is not None:
            code = requested
            break
    return state, code


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluator(config: Config, hooks: Hooks) -> Callable[..., None] | None:
    if hooks.held_out is None:
        return None
    eval_step = make_eval_step(config.model, config.train)

    def evaluate(params, step, writer: MetricsWriter, progress: ProgressLine) -> None:
        sums = [eval_step(params, batch) for batch in hooks.held_out()]
        entropy, targets = (
            math.fsum(s) for s in zip(*jax.device_get(sums), strict=True)
        )
        loss = entropy / targets
        bits = None
        if hooks.bytes_per_token is not None:
            bits = loss / math.log(2) / hooks.bytes_per_token
        writer.write("eval", step, loss=loss, bits_per_byte=bits, targets=int(targets))
        shown = "" if bits is None else f", {bits:.4f} bits per byte"
        progress.note(f"step {step}: held-out loss {loss:.4f}{shown}")

    return evaluate


class _Log:
    """Steps whose metrics are still on the device, and the clocks of the run."""

    def __init__(self, config: Config, writer: MetricsWriter, progress, first: int):
        self._train, self._writer, self._progress = config.train, writer, progress
        self._first = first
        self._pending: list[tuple[int, StepMetrics, float]] = []
        self._wait = 0.0
        self._since = time.monotonic()
        self._pause = 0.0
        last = writer.last_train or {}
        self._wall = last.get("wall_s", 0.0)
        length = config.data.sequence_length
        self._tokens_per_step = config.train.batch_size * length
        self._flops = flops_per_token(config.model, length)
        self._peak = peak_flops(jax.devices(), compute_dtype(config.model.dtype))

    def timed_next(self, batches: Iterator[Batch]) -> Batch:
        start = time.monotonic()
        batch = next(batches)
        self._wait = time.monotonic() - start
        return batch

    def add(self, step: int, metrics: StepMetrics) -> None:
        self._pending.append((step, metrics, self._wait))

    def paused(self) -> "_Pause":
        """Evaluations, samples and saves do not count as training time."""
        return _Pause(self)

    def read(self) -> None:
        """Waits for the pending steps, checks them, and writes those to be logged."""
        if not self._pending:
            return
        steps, metrics, waits = zip(*self._pending, strict=True)
        metrics = jax.tree.map(float, jax.device_get(metrics))
        now = time.monotonic()
        seconds = max(now - self._since - self._pause, 1e-9)
        self._pending, self._since, self._pause = [], now, 0.0
        compiling = steps == (self._first + 1,)
        self._wall += seconds
        rate = self._tokens_per_step * len(steps) / seconds
        for step, m in zip(steps, metrics, strict=True):
            if not (math.isfinite(m.loss) and math.isfinite(m.grad_norm)):
                raise NotFinite(
                    f"step {step}: loss {m.loss}, gradient norm {m.grad_norm}: not "
                    "finite, so nothing was saved since; lower "
                    "optimizer.learning_rate or look at the batch"
                )
            if not _due(step, self._train.log_every) and step != self._train.steps:
                continue
            row = {
                "loss": m.loss,
                "lr": m.lr,
                "grad_norm": m.grad_norm,
                # The first step's time is that of the compiler.
                "tokens_per_s": None if compiling else rate,
                "mfu": None
                if compiling or not self._peak
                else rate * self._flops / self._peak,
                "data_wait_s": sum(waits) / len(waits),
                "step_s": seconds / len(steps),
                "tokens": self._tokens_per_step * step,
                "wall_s": self._wall,
            }
            self._writer.write("train", step, **row)
            self._progress.update({"step": step, **row})


class _Pause:
    def __init__(self, log: _Log):
        self._log = log

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *exception: Any) -> None:
        self._log._pause += time.monotonic() - self._start
