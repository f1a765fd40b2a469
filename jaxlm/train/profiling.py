"""Writes a trace of some steps for xprof (`train.profile.steps`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"


class StepProfile:
    """Traces the steps of a range, each with its number, into `RUN/profile/`."""

    def __init__(self, steps: range, run_dir: Path | str):
        """`steps` may be empty: then nothing is ever traced."""
        self._steps, self._folder = steps, Path(run_dir) / FOLDER
        self._is_on = False

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Runs a step inside; traces it if it is one of the range."""
        if step not in self._steps:
            yield
            return
        if not self._is_on:
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
            jax.profiler.stop_trace()
