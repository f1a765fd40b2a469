"""A program on a pseudo-terminal: what a person sees, and the keys that they press."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyte

# Variables that change what programs write on terminals.
_PLAIN = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE")
# The program's session belongs to the terminal, so that Ctrl-C reaches it.
_TAKE_CONTROL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """Runs a command with its three streams on a terminal.

    Use it as a context manager: leaving it kills the program if it still runs.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        columns: int = 80,
        rows: int = 30,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        on_output: Callable[[], None] = lambda: None,
    ):
        self._on_output = on_output
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(
            theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0)
        )
        own = {k: v for k, v in os.environ.items() if k not in _PLAIN}
        self._child = subprocess.Popen(
            [sys.executable, "-c", _TAKE_CONTROL, *map(str, command)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env={**own, "TERM": "xterm-256color", **(environment or {})},
            start_new_session=True,
        )
        os.close(theirs)
        self._screen = pyte.HistoryScreen(columns, rows, history=100_000, ratio=1.0)
        # Answers questions of the program, such as where the cursor is.
        self._screen.write_process_input = self.send
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        """All bytes that the program wrote."""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._ours)

    def send(self, keys: str) -> None:
        """Presses keys; Enter is a carriage return."""
        with contextlib.suppress(OSError):  # The program has ended.
            os.write(self._ours, keys.encode())

    def lines(self) -> list[str]:
        """Everything that can be read on the terminal, scrolled back to its start."""
        width = range(self._screen.columns)
        gone = ["".join(r[x].data for x in width) for r in self._screen.history.top]
        lines = [line.rstrip() for line in [*gone, *self._screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def wait_for(self, pattern: str, *, timeout_s: float = 300) -> re.Match[str]:
        """Waits until a regular expression matches what is on the terminal."""
        end = time.monotonic() + timeout_s
        while not (match := re.search(pattern, "\n".join(self.lines()))):
            left = end - time.monotonic()
            shown = "\n".join(self.lines())
            assert left > 0, f"{pattern!r} did not appear in {timeout_s} s:\n{shown}"
            assert self._read(left) or re.search(pattern, "\n".join(self.lines())), (
                f"the program ended without {pattern!r}:\n{shown}"
            )
        return match

    def wait(self, *, timeout_s: float = 300) -> int:
        """Waits for the end of the program and returns its exit code."""
        end = time.monotonic() + timeout_s
        while self._read(end - time.monotonic()):
            shown = "\n".join(self.lines())
            assert time.monotonic() < end, (
                f"still running after {timeout_s} s:\n{shown}"
            )
        return self._child.wait()

    @property
    def cursor_is_hidden(self) -> bool:
        return self._screen.cursor.hidden

    def _read(self, timeout_s: float) -> bool:
        """Reads what comes next; False once the other side is closed."""
        ready, _, _ = select.select([self._ours], [], [], max(timeout_s, 0))
        if not ready:
            return True
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # A pty raises it when the other side is closed.
            return False
        self._on_output()
        self.written += data
        self._stream.feed(data)
        return bool(data)
