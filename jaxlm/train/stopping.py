"""Stopping a run early."""

import signal
import time

from jaxlm.terminal.exit_codes import EXIT_INTERRUPTED, EXIT_PREEMPTED
from jaxlm.terminal.interrupts import Interrupts

SIGNAL_CODES: dict[int, int] = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_PREEMPTED,
    signal.SIGHUP: EXIT_PREEMPTED,
}


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite."""


class StopRequest(Interrupts):
    """Turns signals and the time limit into a request that the loop reads.

    The signals are Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed.

    After the first signal the loop finishes its step and saves the state. A second
    signal ends the process at once; earlier checkpoints stay. Use it as a context
    manager in the main thread; it restores the previous handlers.
    """

    def __init__(self, max_minutes: float = 0.0):
        """Starts the time limit of `max_minutes` now; 0 sets none."""
        super().__init__(
            SIGNAL_CODES,
            "stopping after this step and saving; Ctrl-C again ends at once",
            raises=False,
        )
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None

    def is_requested(self) -> bool:
        """Whether to stop."""
        return self.exit_code() is not None

    def exit_code(self) -> int | None:
        """Returns the exit code to stop with; None to go on."""
        if self.received is not None:
            return SIGNAL_CODES[self.received]
        if self._deadline is not None and time.monotonic() > self._deadline:
            return EXIT_PREEMPTED
        return None
