"""The training loop: takes any iterator of batches and returns a trained state."""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float

from jaxlm.checkpoint.native.save_error import SaveError
from jaxlm.config import Config, TrainConfig
from jaxlm.sharding.processes import ALONE, Processes
from jaxlm.terminal.exit_codes import EXIT_DONE
from jaxlm.terminal.progress import ProgressLine, Waiting
from jaxlm.train.goodput import Goodput
from jaxlm.train.metrics import MetricsWriter
from jaxlm.train.profiling import StepProfile
from jaxlm.train.state import TrainState
from jaxlm.train.step import EvalStep, StepMetrics, make_eval_step, make_train_step
from jaxlm.train.stopping import NotFinite, SaveClock, StopRequest
from jaxlm.train.throughput import flops_per_token, peak_flops
from jaxlm.types import Batch, Params

# A run shows at least this often that it goes on.
SHOW_SECONDS = 1.0
# Steps that may wait for the device while it computes one.
AHEAD = 2


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls, since it opens no files and samples no tokens."""

    save: Callable[[TrainState], None]
    """Saves a state. The loop has checked that its loss and gradient are finite. Raises
    SaveError, once, if the save before has failed, or if this one cannot start."""
    held_out: Callable[[], Iterable[Batch]] | None = None
    """Returns the batches of one evaluation; None: no evaluation."""
    bytes_per_token: float | None = None
    """Mean UTF-8 bytes per held-out token, for bits per byte; None if unknown."""
    sample: Callable[[Params, int, Callable[[], bool]], str] | None = None
    """Generates text from the parameters at a step, until the function that it is given
    returns True; None: no samples."""
    look: Callable[[Params], Mapping[str, Any]] | None = None
    """Returns the fields of a "look" row, from the parameters; None: no looks."""


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
    missing: Collection[str] = (),
    started: float | None = None,
    processes: Processes = ALONE,
) -> tuple[TrainState, int]:
    """Trains until step `config.train.steps`, or until `stop` requests an end.

    Args:
      config: the whole run.
      state: donated to the first step; it must not be used afterwards.
      batches: one batch per step, the first for the step after that of `state`;
        already on the mesh.
      missing: kinds of rows that the step of `state` should have and has not
        (`due_kinds`).
      started: `time.monotonic()` when the process began; None takes now.
      processes: those of the run.

    A state is saved before it is evaluated and sampled, which a stop ends between two
    batches. What a stop or a kill left out is done when the run goes on from there, so
    its rows are those of a run that was never stopped.

    Returns:
      The final state, which has been saved, and the exit code (`exit_codes.py`).

    Raises:
      NotFinite: at the first step whose loss or gradient is not finite; with
        `train.skip_spikes`, at the first that is one too many in a row. Checkpoints
        saved before it are untouched.
      ValueError: when `batches` raises it; the steps before are saved.
    """
    train = config.train
    train_step = make_train_step(config, optimizer)
    eval_step = make_eval_step(config.model, train)
    step = saved_step = int(state.step)
    first = step + 1
    started = time.monotonic() if started is None else started
    log = _Log(config, writer, progress, first)
    clock = SaveClock(train.checkpoint_minutes, processes)
    profile = StepProfile(config.profile.range, train.run_dir)

    def look(kinds: Collection[str]) -> None:
        """Evaluates, samples and inspects the state, unless a stop is requested."""
        if "eval" in kinds and hooks.held_out and not stop.is_requested():
            with log.waiting("evaluating"):
                batches = hooks.held_out()
                sums = _evaluate(eval_step, state.params, batches, stop)
            if stop.is_requested():
                return
            log.evaluation(step, sums, hooks.bytes_per_token)
        if "sample" in kinds and hooks.sample and not stop.is_requested():
            with log.waiting("sampling"):
                text = hooks.sample(state.params, step, stop.is_requested)
            if not stop.is_requested():  # Then the text is cut off.
                log.sample(step, text)
        if "look" in kinds and hooks.look and not stop.is_requested():
            with log.waiting("looking inside"):
                log.look(step, hooks.look(state.params))

    def save(is_last: bool) -> None:
        """Saves the current state. What fails may also be the save before."""
        goes_on = is_last or train.on_save_error == "continue"
        with log.waiting("saving"):
            for tries in (1, 2):
                try:
                    return hooks.save(state)
                except SaveError as error:
                    if not goes_on or (is_last and tries == 2):
                        raise
                    log.save_failed(step, error)

    def save_rest() -> None:
        """Saves the steps since the last save."""
        if saved_step < step:
            log.read()
            save(is_last=True)

    if missing:
        with log.paused("looking"):
            look(missing)
        if stop.is_requested() and stop.by_signal:  # There is nothing new to save.
            return state, stop.exit_code or EXIT_DONE
    while step < train.steps:
        step += 1
        # Step. JAX returns after dispatch, before the device has computed it.
        try:
            batch = log.timed_next(batches)
        except ValueError:  # The text cannot be read any more.
            step -= 1
            save_rest()
            raise
        with profile.of(step):
            if step == first:
                log.goodput.add("starting", time.monotonic() - started)
                with Waiting("compiling the training step"):
                    state, metrics = jax.block_until_ready(train_step(state, batch))
                log.first_step(step, time.monotonic() - started)
            else:
                state, metrics = train_step(state, batch)
        profile.finish(step, metrics)
        log.add(step, metrics)

        # Read the metrics, for which the host waits for the device.
        kinds = due_kinds(train, hooks, step)
        is_due = step == train.steps or _due(step, train.checkpoint_every)
        is_due |= clock.is_due()
        if is_due or kinds or step == first or log.is_due(step):
            log.read()

        # Save before evaluating and sampling, which may take long or fail.
        with log.paused("saving"):
            if is_due and not stop.is_requested():
                save(is_last=step == train.steps)
                clock.restart()
                saved_step = step
        with log.paused("looking"):
            look(kinds)
        if stop.is_requested():
            break
    profile.close()
    save_rest()
    stop.is_requested()  # A signal during the last save is answered too.
    return state, stop.exit_code or EXIT_DONE


def _evaluate(
    eval_step: EvalStep, params: Params, batches: Iterable[Batch], stop: StopRequest
) -> list[tuple[Float[np.ndarray, ""], Float[np.ndarray, ""]]]:
    """Returns the sums of each batch, up to the one at which a stop is requested.

    Few batches are in flight, and none at the end. More would fill the memory, and on
    several CPU devices JAX 0.10 deadlocks when about 30 independent programs are.
    """
    sums = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-1 - AHEAD : -AHEAD])
        if stop.is_requested():
            break
    return jax.device_get(sums)


def due_kinds(train: TrainConfig, hooks: Hooks, step: int) -> set[str]:
    """Returns which of the rows "eval", "sample" and "look" a step has."""
    kinds, last = set(), step == train.steps
    if hooks.held_out and (last or _due(step, train.eval_every)):
        kinds.add("eval")
    if hooks.sample and train.sample_every and (last or _due(step, train.sample_every)):
        kinds.add("sample")
    if hooks.look and train.look_every and (last or _due(step, train.look_every)):
        kinds.add("look")
    return kinds


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Log:
    """Writes metrics to `metrics.jsonl` and to the terminal, and measures time.

    The metrics of a step stay on the device until they are read, at least once a
    second.
    """

    def __init__(
        self, config: Config, writer: MetricsWriter, progress: ProgressLine, first: int
    ):
        """`first` is the first step of this process, which compiles."""
        self._train, self._writer, self._progress = config.train, writer, progress
        self._first = first
        self._pending: list[tuple[int, StepMetrics, float]] = []
        self._wait = 0.0
        # Since the last row: seconds of training, and the wait of each step.
        self._seconds, self._waits = 0.0, []
        self._step_s = 0.0  # of the steps that were read last
        self._awaited: set[str] = set()
        last = writer.last_train or {}
        self._wall = last.get("wall_s", 0.0)
        length = config.data.sequence_length
        self._tokens_per_step = config.train.batch_size * length
        self._flops = flops_per_token(config.model, length)
        self._peak = peak_flops(jax.devices())
        self._since, self._pause = time.monotonic(), 0.0
        self.goodput = Goodput(writer.last_train, writer.last_before)

    def timed_next(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch, and measures the wait for the row of its step."""
        start = time.monotonic()
        batch = next(batches)
        self._wait = time.monotonic() - start
        return batch

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Queues the metrics of a step that may still be running.

        Waits until few steps are: more would only delay what the terminal shows, and
        the answer to Ctrl-C.
        """
        self._pending.append((step, metrics, self._wait))
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD])

    def is_due(self, step: int) -> bool:
        """Whether the metrics should be read: for a row, or to show that it goes on.

        Slow steps are read one by one, as the device need not be ahead of the host.
        """
        return (
            _due(step, self._train.log_every)
            or step == self._first + 1  # the first that tells how long one takes
            or self._step_s >= SHOW_SECONDS
            or time.monotonic() - self._since - self._pause >= SHOW_SECONDS
        )

    def waiting(self, doing: str) -> Waiting:
        """Shows what the loop does if that takes long; the first time it compiles."""
        if doing in self._awaited or doing == "saving":
            return Waiting(doing, in_logs=False)
        self._awaited.add(doing)
        return Waiting(f"compiling and {doing}")

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Counts what runs inside as `kind` of `goodput.KINDS`, not as steps."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self._pause += seconds
        self.goodput.add(kind, seconds)

    def first_step(self, step: int, seconds: float) -> None:
        """Records the time from process start to the end of the first step."""
        self._writer.write("event", step, event="first step", since_start_s=seconds)

    def evaluation(
        self,
        step: int,
        sums: Sequence[tuple[Float[np.ndarray, ""], Float[np.ndarray, ""]]],
        bytes_per_token: float | None,
    ) -> None:
        """Writes the held-out loss, from sums of cross-entropies and of weights."""
        entropy, targets = (math.fsum(s) for s in zip(*sums, strict=True))
        loss, bits, shown = entropy / targets, None, ""
        if bytes_per_token is not None:
            bits = loss / math.log(2) / bytes_per_token
            shown = f", {bits:.4f} bits per byte"
        self._writer.write(
            "eval", step, loss=loss, bits_per_byte=bits, targets=int(targets)
        )
        self._progress.note(f"step {step}: held-out loss {loss:.4f}{shown}")

    def sample(self, step: int, text: str) -> None:
        """Writes a generated text."""
        prompt = self._train.sample_prompt
        self._writer.write("sample", step, text=text, prompt=prompt)
        shown = (prompt + text).strip("\n")
        self._progress.note(f"\n--- sample at step {step}\n{shown}\n")

    def look(self, step: int, fields: Mapping[str, Any]) -> None:
        """Writes what was seen inside."""
        self._writer.write("look", step, **fields)

    def save_failed(self, step: int, error: SaveError) -> None:
        """Writes that a checkpoint could not be saved."""
        self._writer.write("event", step, event="save failed", message=str(error))
        self._progress.note(f"{error}; the run goes on")

    def read(self) -> None:
        """Waits for the pending steps, checks them, and writes the rows that are due.

        Raises:
          NotFinite: if a loss or a gradient norm is not finite, or too many steps in a
            row were skipped.
        """
        if not self._pending:
            return
        steps, metrics, waits = zip(*self._pending, strict=True)
        metrics = jax.tree.map(float, jax.device_get(metrics))
        now = time.monotonic()
        seconds = max(now - self._since - self._pause, 1e-9)
        self._pending, self._since, self._pause = [], now, 0.0
        self._wall += seconds
        self._step_s = seconds / len(steps)
        waited_s = min(sum(waits), seconds)
        self.goodput.add("data", waited_s)
        kind = "compiling" if steps[-1] == self._first else "steps"
        self.goodput.add(kind, seconds - waited_s)
        self._seconds += seconds
        self._waits += waits
        for step, m in zip(steps, metrics, strict=True):
            self._check(step, m)
        step, m = steps[-1], metrics[-1]  # Steps of a row are read at once.
        row = {
            **{"loss": m.loss, "lr": m.lr, "grad_norm": m.grad_norm},
            **({} if m.expert_load is None else {"expert_load": m.expert_load}),
            **self._timing(step),
            "tokens": self._tokens_per_step * step,
            "wall_s": self._wall,
            "time_s": self.goodput.seconds,
        }
        is_row = _due(step, self._train.log_every) or step == self._train.steps
        if is_row:
            with self.paused("looking"):  # sinks and the report take time too
                self._writer.write("train", step, **row)
        if is_row or step == self._first:
            self._seconds, self._waits = 0.0, []
        if step == self._first:  # Its seconds are those of compiling.
            row = {"loss": m.loss, "lr": m.lr}
        self._progress.update({"step": step, **row})

    def _check(self, step: int, m: StepMetrics) -> None:
        """Reports a step that was skipped, or raises NotFinite if it ends the run."""
        finite = math.isfinite(m.loss) and math.isfinite(m.grad_norm)
        batch = self._train.batch_of(step)
        where = f"step {step}" if batch == step else f"step {step} (batch {batch})"
        what = f"{where}: loss {m.loss:.4g}, gradient norm {m.grad_norm:.4g}"
        kind = "a spike" if finite else "not finite"
        advice = "lower --optimizer.learning-rate or look at the batch"
        if m.skipped is None and not finite:
            raise NotFinite(f"{what}: {kind}, so nothing was saved since; {advice}")
        if not m.skipped:
            return
        values = {"batch": batch, "loss": m.loss, "grad_norm": m.grad_norm}
        with self.paused("looking"):
            self._writer.write("event", step, event="step skipped", **values)
        if m.skipped > self._train.skip_spikes:
            raise NotFinite(
                f"{what}: {kind}, after {self._train.skip_spikes} steps in a row that "
                f"were skipped (--train.skip-spikes); {advice}"
            )
        self._progress.note(f"{what}: {kind}, so this step is not applied")

    def _timing(self, step: int) -> dict[str, float | None]:
        """Rates over the steps since the last row; None for the step that compiled."""
        rate = mfu = None
        count = len(self._waits)
        if step != self._first:
            rate = self._tokens_per_step * count / self._seconds
            mfu = rate * self._flops / self._peak if self._peak else None
        return {
            "tokens_per_s": rate,
            "mfu": mfu,
            "data_wait_s": sum(self._waits) / count,
            "step_s": self._seconds / count,
        }
