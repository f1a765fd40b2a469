"""The training loop: takes any iterator of batches and returns a trained state."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from jaxlm.train.metrics import MetricsWriter
from jaxlm.train.profiling import StepProfile
from jaxlm.train.run_log import AHEAD, RunLog, due
from jaxlm.train.state import TrainState
from jaxlm.train.step import EvalStep, make_eval_step, make_train_step
from jaxlm.train.stopping import NotFinite, SaveClock, StopRequest
from jaxlm.types import Batch, Params


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls, since it opens no files and samples no tokens."""

    save: Callable[[TrainState], None]
    """Saves a state. The loop has checked that its loss and gradient are finite. Raises
    SaveError, once, if the save before has failed, or if this one cannot start. A state
    that is being saved is waited for, and not saved again."""
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

    A state is saved before it is evaluated and sampled, which a stop ends between two
    batches. What a stop or a kill left out is done when the run goes on from there, so
    its rows are those of a run that was never stopped.

    Args:
      config: the whole run.
      state: donated to the first step; it must not be used afterwards.
      batches: one batch per step, the first for the step after that of `state`;
        already on the mesh.
      missing: kinds of rows that the step of `state` should have and has not
        (`due_kinds`).
      started: `time.monotonic()` when the process began; None takes now.
      processes: those of the run.

    Returns:
      The final state, which has been saved, and the exit code (`exit_codes.py`).

    Raises:
      NotFinite: at the first step whose loss, gradient or held-out loss is not finite;
        with `train.skip_spikes`, at the first that is one too many in a row, or whose
        held-out loss is not. Checkpoints saved before it are untouched.
      ValueError: when `batches` raises it; the steps before are saved. So they are for
        whatever else it raises, or an evaluation, a sample or a look, in a run of one
        process.
    """
    train = config.train
    train_step = make_train_step(config, optimizer)
    eval_step = make_eval_step(config.model, train)
    step = saved_step = int(state.step)
    first = step + 1
    started = time.monotonic() if started is None else started
    log = RunLog(config, writer, progress, first)
    clock = SaveClock(train.checkpoint_minutes, processes)
    profile = StepProfile(config.profile.range, train.run_dir)

    def save_rest() -> None:
        """Saves the steps since the last save."""
        if saved_step < step:
            log.read()
            _save(state, step, train, hooks, log, is_last=True)

    if missing:
        with log.paused("looking"):
            _look(missing, state.params, step, hooks, eval_step, log, stop)
        if stop.is_requested() and stop.by_signal:  # There is nothing new to save.
            return state, stop.exit_code or EXIT_DONE
    while step < train.steps:
        step += 1
        # Step. JAX returns after dispatch, before the device has computed it.
        try:
            batch = log.timed_next(batches)
        except Exception as error:  # The text cannot be read, or memory is short.
            step -= 1
            if isinstance(error, ValueError) or processes.count == 1:
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
        saves = step == train.steps or due(step, train.checkpoint_every)
        saves |= due(step, train.keep_every)
        saves |= clock.is_due()
        if saves or kinds or step == first or log.is_due(step):
            log.read()

        # Save before evaluating and sampling, which may take long or fail.
        with log.paused("saving"):
            if saves and not stop.is_requested():
                _save(state, step, train, hooks, log, is_last=step == train.steps)
                clock.restart()
                saved_step = step
        try:
            with log.paused("looking"):
                _look(kinds, state.params, step, hooks, eval_step, log, stop)
        except NotFinite:
            raise
        except Exception:  # as when the device has no memory for it
            if processes.count == 1:  # Others would have to save too.
                save_rest()
            raise
        if stop.is_requested():
            break
    save_rest()
    profile.close()
    stop.is_requested()  # A signal during the last save is answered too.
    return state, stop.exit_code or EXIT_DONE


def _save(
    state: TrainState,
    step: int,
    train: TrainConfig,
    hooks: Hooks,
    log: RunLog,
    *,
    is_last: bool,
) -> None:
    """Saves a state, after its rows. What fails may also be the save before.

    Then this one is saved all the same: the disk may have room again.
    """
    log.sync()
    must_succeed = is_last or train.on_save_error == "stop"
    with log.waiting("saving"):
        for tries in (1, 2):
            try:
                hooks.save(state)
                if tries == 2 and must_succeed:
                    hooks.save(state)  # Waits; what is saved is not written again.
                # Rows that have waited, since the save has made the folder again.
                return log.sync()
            except SaveError as error:
                if must_succeed and tries == 2:
                    raise
                log.save_failed(step, error)


def _look(
    kinds: Collection[str],
    params: Params,
    step: int,
    hooks: Hooks,
    eval_step: EvalStep,
    log: RunLog,
    stop: StopRequest,
) -> None:
    """Evaluates, samples and looks inside, unless a stop is requested."""
    if "eval" in kinds and hooks.held_out and not stop.is_requested():
        with log.waiting("evaluating"):
            sums = _evaluate(eval_step, params, hooks.held_out(), stop)
        if stop.is_requested():
            return
        log.evaluation(step, sums, hooks.bytes_per_token)
    if "sample" in kinds and hooks.sample and not stop.is_requested():
        with log.waiting("sampling"):
            text = hooks.sample(params, step, stop.is_requested)
        if not stop.is_requested():  # Then the text is cut off.
            log.sample(step, text)
    if "look" in kinds and hooks.look and not stop.is_requested():
        with log.waiting("looking inside"):
            log.look(step, hooks.look(params))


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
    if hooks.held_out and (last or due(step, train.eval_every)):
        kinds.add("eval")
    if hooks.sample and train.sample_every and (last or due(step, train.sample_every)):
        kinds.add("sample")
    if hooks.look and train.look_every and (last or due(step, train.look_every)):
        kinds.add("look")
    return kinds
