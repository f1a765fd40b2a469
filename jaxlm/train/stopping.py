"""Stopping a run early."""

import signal
import time

from jaxlm.sharding.processes import ALONE, Processes
from jaxlm.terminal.exit_codes import (
    EXIT_INTERRUPTED,
    EXIT_NOT_FINITE,
    EXIT_PREEMPTED,
)
from jaxlm.terminal.interrupts import Interrupts
from jaxlm.train.cloud_notice import CloudNotice

SIGNAL_CODES: dict[int, int] = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_PREEMPTED,
    signal.SIGHUP: EXIT_PREEMPTED,
    # Batch systems send these before they end a job.
    signal.SIGUSR1: EXIT_PREEMPTED,
    signal.SIGUSR2: EXIT_PREEMPTED,
    signal.SIGXCPU: EXIT_PREEMPTED,
}


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = EXIT_NOT_FINITE


class StopRequest(Interrupts):
    """Turns signals, notices of a cloud and a time limit into what the loop asks for.

    The signals are Ctrl-C, SIGTERM, SIGHUP of a terminal that is closed, and those by
    which batch systems announce that a limit of time is near.

    After the first signal the loop finishes its step and saves the state. A second
    signal ends the process at once; earlier checkpoints stay. Use it as a context
    manager in the main thread; it restores the previous handlers.

    Of several processes one that is to stop stops all, at the same call of
    `is_requested`, which each must make equally often.
    """

    def __init__(self, max_minutes: float = 0.0, processes: Processes = ALONE):
        """Starts the time limit of `max_minutes` now; 0 sets none."""
        super().__init__(
            SIGNAL_CODES,
            "stopping after this step and saving; Ctrl-C again ends at once",
            raises=False,
        )
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._cloud = CloudNotice()
        self._agreement = processes.agreement("stop")
        self.exit_code: int | None = None
        """The exit code to stop with, since `is_requested` is True; None to go on."""
        self.by_signal = False
        """Whether a signal or a notice, not the time limit, is why."""

    def __enter__(self) -> "StopRequest":
        self._cloud.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._cloud.__exit__(*exception)

    def is_requested(self) -> bool:
        """Whether to stop."""
        wanted = None
        if self.received is not None:
            wanted = SIGNAL_CODES[self.received], True
        elif self._cloud.text is not None:
            wanted = EXIT_PREEMPTED, True
        elif self._deadline is not None and time.monotonic() > self._deadline:
            wanted = EXIT_PREEMPTED, False
        agreed = self._agreement.reached(wanted)
        if agreed is not None:
            self.exit_code, self.by_signal = agreed
        return agreed is not None


class SaveClock:
    """Says when a save is due by time; of several processes in all at the same step."""

    def __init__(self, minutes: float, processes: Processes = ALONE):
        """Starts now; with 0 minutes none is ever due."""
        self._minutes, self._processes, self._saves = minutes, processes, 0
        self.restart()

    def restart(self) -> None:
        """Starts again, at a save."""
        self._since = time.monotonic()
        self._saves += 1
        self._agreement = self._processes.agreement(f"save {self._saves}")

    def is_due(self) -> bool:
        """Whether a save is due; call it once a step."""
        passed = (time.monotonic() - self._since) / 60
        is_late = self._minutes > 0 and passed >= self._minutes
        return bool(self._agreement.reached(True if is_late else None))
