"""Stopping a run early, and the exit codes that report how it ended."""

import os
import signal
import time
from types import FrameType
from typing import Any

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_NO_CHECKPOINT = 3
EXIT_NOT_FINITE = 4
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite."""


class StopRequest:
    """Turns Ctrl-C, SIGTERM and the time limit into a request that the loop reads.

    After the first signal the loop finishes its step and saves the state. A second
    signal ends the process at once; earlier checkpoints stay. Use it as a context
    manager in the main thread; it restores the previous handlers.
    """

    def __init__(self, max_minutes: float = 0.0):
        """Starts the time limit of `max_minutes` now; 0 sets none."""
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._code: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
        if self._code is not None:
            os._exit(code)
        self._code = code

    def exit_code(self) -> int | None:
        """Returns the exit code to stop with; None to go on."""
        if self._code is not None:
            return self._code
        if self._deadline is not None and time.monotonic() > self._deadline:
            return EXIT_PREEMPTED
        return None
