"""Writes a trace of some steps for xprof (`train.profile.steps`)."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm.terminal.printable import error_line

FOLDER = "profile"

logger = logging.getLogger(__name__)


class StepProfile:
    """Traces the steps of a range, each with its number, into `RUN/profile/`.

    A trace that cannot be written is given up, with a warning: training goes on.
    """

    def __init__(self, steps: range, run_dir: Path | str):
        """`steps` may be empty: then nothing is ever traced."""
        self._steps, self._folder = steps, Path(run_dir).absolute() / FOLDER
        self._is_on = False

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Runs a step inside; traces it if it is one of the range."""
        if step not in self._steps:
            yield
            return
        if not self._is_on:
            with self._or_given_up():
                jax.profiler.start_trace(self._folder)
                self._is_on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def finish(self, step: int, result: Any) -> None:
        """Ends the trace after its last step, for which it waits."""
        if self._is_on and step >= self._steps.stop - 1:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes a trace whose last step was not reached."""
        if self._is_on:
            self._is_on = False
            with self._or_given_up():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _or_given_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # JAX raises several types, also for a full disk.
            self._steps = range(0)
            logger.warning(
                "%s: no trace is written (%s), training goes on",
                *(self._folder, error_line(error)),
            )
