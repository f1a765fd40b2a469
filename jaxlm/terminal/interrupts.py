"""Ctrl-C and SIGTERM, answered even while the main thread sits in compiled code.

Python runs the handler of a signal in the main thread, between two instructions of
Python, and there is none for as long as a program compiles. Here a thread hears of the
signal at once, acknowledges it, and ends the process at the second one.
"""

import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from jaxlm.terminal.exit_codes import EXIT_INTERRUPTED
from jaxlm.terminal.room import has_room

# A main thread that has not answered by then runs compiled code.
_PATIENCE_SECONDS = 0.3
# What follows the first signal within this time repeats it: a terminal that is closed
# sends SIGHUP to a program, and so does its shell; `timeout` signals a program and the
# group it is in. A person is slower than 0.1 s, and only a person sends SIGINT later.
_REPEAT_SECONDS, _CTRL_C_REPEAT_SECONDS = 2.0, 0.1
CTRL_C: Mapping[int, int] = {signal.SIGINT: EXIT_INTERRUPTED}
ENDS: Mapping[int, int] = {
    **CTRL_C,
    **{number: 128 + number for number in (signal.SIGTERM, signal.SIGHUP)},
}
"""What ends a command that then shows what there is -> the exit code."""


class Interrupts(contextlib.AbstractContextManager):
    """Answers signals, in the main thread; of nested ones the innermost does.

    With `raises`, the main thread gets an exception: KeyboardInterrupt for SIGINT, and
    SystemExit with the exit code for others. Without, the program reads `received`. A
    signal that comes before an earlier one had its effect ends the process at once,
    unless it only repeats it.
    Python drops what is raised in a callback of the garbage collector: then the program
    can read `received`, and the next signal ends the process.

    An event loop of asyncio that has run inside has switched the thread off: enter
    another one after it.
    """

    def __init__(
        self,
        exit_codes: Mapping[int, int],
        notice: str = "stopping as soon as possible; Ctrl-C again ends at once",
        *,
        raises: bool = True,
    ):
        """Changes nothing yet.

        Args:
          exit_codes: the signals to answer -> the exit code of the process.
          notice: a line for stderr after the first signal: what happens now, and what
            a second one does. With `raises`, only if the main thread cannot answer.
          raises: raise an exception in the main thread.
        """
        self.received: int | None = None
        """The first signal since this was entered, or None."""
        self._exit_codes, self._notice, self._raises = exit_codes, notice, raises
        # The signal that has had no effect yet, and when it came.
        self._unanswered: tuple[int, float] | None = None
        # The handler can interrupt itself.
        self._lock = threading.RLock()

    def __enter__(self) -> "Interrupts":
        # Each signal is a byte in here. Who takes it answers the signal: the handler,
        # or after a while the thread.
        self._heard, self._told = socket.socketpair()
        for end in (self._heard, self._told):
            end.setblocking(False)
        self._old_handlers: dict[int, Any] = {
            number: signal.signal(number, self._handle)
            for number in self._exit_codes
            if not _is_ignored(number)
        }
        self._old_descriptor = signal.set_wakeup_fd(
            self._told.fileno(), warn_on_full_buffer=False
        )
        self._old_hook = sys.unraisablehook
        sys.unraisablehook = self._dropped
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        sys.unraisablehook = self._old_hook
        signal.set_wakeup_fd(self._old_descriptor)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._told.close()  # ends the thread

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        if not self._raises:
            return
        with self._lock:
            self._unanswered = None
            self._take()
        raise self.ending(number)

    def ending(self, number: int) -> BaseException:
        """Returns what is raised for a signal."""
        if number == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(self._exit_codes[number])

    def _take(self) -> bytes:
        """Takes the numbers of the signals that nobody has answered."""
        with contextlib.suppress(BlockingIOError):  # There are none.
            return self._heard.recv(64)
        return b""

    def _listen(self) -> None:
        with self._heard:
            while not self._is_over():
                now = time.monotonic()
                if self._raises and self._unanswered is None:
                    time.sleep(_PATIENCE_SECONDS)
                with self._lock:
                    is_first = False
                    for number in set(self._take()) & self._exit_codes.keys():
                        if self._unanswered is None:
                            self._unanswered, is_first = (number, now), True
                        elif self._is_another(number, *self._unanswered):
                            _end(self._exit_codes[number])
                if is_first:
                    self._acknowledge()

    @staticmethod
    def _is_another(number: int, first: int, since: float) -> bool:
        """Whether a signal is more than a repetition of the `first`, at `since`.

        Batch systems announce an end by one signal and then by another, long before
        they kill: by SIGUSR1 or SIGINT, and by SIGTERM. That is one request.
        """
        is_ctrl_c = number == signal.SIGINT
        if number == signal.SIGXCPU:  # comes once a second
            return False
        if number != first and not is_ctrl_c:
            return False
        seconds = _CTRL_C_REPEAT_SECONDS if is_ctrl_c else _REPEAT_SECONDS
        return time.monotonic() - since > seconds

    def _acknowledge(self) -> None:
        # A terminal shows ^C at the start of the line.
        notice = "\r" * sys.stderr.isatty() + self._notice
        with contextlib.suppress(OSError):  # The terminal may be gone.
            print(notice, file=sys.stderr, flush=True)

    def _dropped(self, unraisable: Any) -> None:
        """Takes the place of Python's traceback for an exception that it drops."""
        received = self.received if self._raises else None
        is_ours = unraisable.exc_type in (KeyboardInterrupt, SystemExit)
        if received is not None and is_ours:
            with self._lock:
                self._unanswered = received, time.monotonic()
            self._acknowledge()
        else:
            self._old_hook(unraisable)

    def _is_over(self) -> bool:
        """Waits for a signal, and returns False, or for the end."""
        select.select([self._heard], [], [])
        with contextlib.suppress(BlockingIOError):  # The handler was faster.
            return not self._heard.recv(1, socket.MSG_PEEK)
        return False


class TextInterrupts(Interrupts):
    """Ctrl-C, and perhaps other signals, while a text is generated.

    They are raised while `are_raised` is set: until the first words. After that they
    are only noted, so that the generation ends in order, and what there is can be
    shown; with `raises_again` a second one is raised.
    """

    def __init__(
        self,
        notice: str,
        *,
        raises_again: bool = False,
        exit_codes: Mapping[int, int] = CTRL_C,
    ) -> None:
        # The notice comes below the text that has been shown.
        super().__init__(exit_codes, f"\n{notice}")
        self.are_raised, self._raises_again = False, raises_again
        self._noted_at = math.inf

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_again = now - self._noted_at > _CTRL_C_REPEAT_SECONDS
        try:
            super()._handle(number, frame)
        except (KeyboardInterrupt, SystemExit):
            if self.are_raised or (is_again and self._raises_again):
                raise
            self._noted_at = min(self._noted_at, now)


def _is_ignored(number: int) -> bool:
    """Whether a signal stays ignored: SIGHUP under `nohup`."""
    # Shells ignore SIGINT in whatever they start in the background.
    return number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


def _end(code: int) -> None:
    with contextlib.suppress(OSError):  # The terminal may be gone.
        # The shell's prompt comes below the line of a display.
        if os.isatty(2) and has_room(2):
            os.write(2, b"\n")
    os._exit(code)
