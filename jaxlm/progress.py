"""Progress on standard error: bars, spinners and the line of a training run.

On a terminal, rich draws them below each other, and other output appears above them.
Elsewhere (a pipe, a log, `TERM=dumb`) plain lines are printed.
"""

import contextlib
import functools
import io
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

# Shorter work shows no progress.
DELAY_SECONDS = 2.0
# Width of a training run's bar, in characters.
BAR_WIDTH = 20
# Control characters could move the cursor; newlines and tabs are harmless.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# The type checks in tests do not accept an int where a float is annotated.
Number = float | int


def format_count(value: Number) -> str:
    """Formats a count in about four characters: 950, 41.2k, 3.1M; '-' if not finite."""
    if not math.isfinite(value):
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: Number) -> str:
    """Formats a duration: 0:07, 3:12, 1:02:03, 2d 03h; '-' if not finite."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    if hours:
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{rest // 60}:{rest % 60:02d}"


def format_row(row: Mapping[str, Any], eta_s: Number | None = None) -> str:
    """Formats `loss 2.314 lr 1.9e-02 41.2k tok/s MFU 31% wait 0% eta 3:12`.

    Args:
      row: a training row (`metrics.FIELDS`); fields that are missing or None are left
        out.
      eta_s: seconds left.
    """
    parts = []
    if (loss := row.get("loss")) is not None:
        parts.append(f"loss {loss:.3f}" if abs(loss) < 1e4 else f"loss {loss:.2e}")
    if (lr := row.get("lr")) is not None:
        parts.append(f"lr {lr:.1e}")
    if (rate := row.get("tokens_per_s")) is not None:
        parts.append(f"{format_count(rate)} tok/s")
    if (mfu := row.get("mfu")) is not None and math.isfinite(mfu):
        parts.append(f"MFU {100 * mfu:.{1 if 0 < mfu < 0.0995 else 0}f}%")
    if row.get("step_s") and "data_wait_s" in row:
        parts.append(f"wait {100 * row['data_wait_s'] / row['step_s']:.0f}%")
    if eta_s is not None:
        parts.append(f"eta {format_seconds(eta_s)}")
    return " ".join(parts)


@contextlib.contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows rate and remaining time, once the work has taken two seconds.

    Args:
      title: what is done and where the result goes.
      total_bytes: bytes of all the work.

    Yields:
      A function to call with the number of bytes done so far.
    """
    with _delayed_display(
        title,
        total_bytes,
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ) as update:
        yield lambda done: update(completed=min(done, total_bytes))


@contextlib.contextmanager
def spinner(title: str) -> Iterator[Callable[[], None]]:
    """Shows that work of unknown length is running, and for how long.

    Yields:
      A function to call now and then; the spinner appears after two seconds.
    """
    with _delayed_display(
        title,
        None,
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    ) as update:
        yield update


@contextlib.contextmanager
def _delayed_display(
    title: str, total: int | None, *columns: ProgressColumn
) -> Iterator[Callable[..., None]]:
    bar = _display(_console(sys.stderr), *columns)
    task = bar.add_task(title, total=total)
    began = time.monotonic()

    def update(**fields: Any) -> None:
        if time.monotonic() - began > DELAY_SECONDS:
            _start(bar)
        bar.update(task, **fields)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


class ProgressLine:
    """Shows training rows on stderr as they come.

    On a terminal, a bar and the figures of the last row are updated in place.
    Elsewhere, plain lines are printed at most every `every_s` seconds; the first and
    the last row are always printed.
    """

    def __init__(
        self,
        steps: int,
        *,
        stream: io.TextIOBase | None = None,
        every_s: Number = 10.0,
        clock: Callable[[], Number] = time.monotonic,
    ):
        """Prepares the display; nothing is shown yet.

        Args:
          stream: output stream; None is stderr.
          every_s: seconds between plain lines.
          clock: returns the time in seconds.
        """
        self._steps = steps
        self._console = _console(sys.stderr if stream is None else stream)
        self._live = self._console.is_interactive
        self._every_s = every_s
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._shown_at = -math.inf
        self._pending: str | None = None
        self._bar = _display(
            self._console,
            # On a narrow terminal the bar shrinks first, then the figures are cut.
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, min_width=len(self._count(steps))),
            ),
            BarColumn(None, table_column=Column(max_width=BAR_WIDTH)),
            TextColumn("{task.fields[figures]}", markup=False),
        )
        self._task = self._bar.add_task("", total=steps, figures="")

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes a training row (`metrics.FIELDS`), and shows it if one is due."""
        now, step = self._clock(), row["step"]
        if self._first is None:
            self._first = (step, now)
        figures = format_row(row, self._time_left(step, now, row.get("step_s")))
        count = self._count(step)
        if self._live:
            self._bar.update(
                self._task, completed=step, description=count, figures=figures
            )
            _start(self._bar)
            return
        filled = BAR_WIDTH * step // self._steps
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        self._pending = f"{count} [{bar}] {figures}"
        if now - self._shown_at >= self._every_s or step >= self._steps:
            self._write_row(self._pending, now)

    def note(self, text: str) -> None:
        """Prints text above the live line, without control characters."""
        text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
        if self._live:
            self._console.out(text, highlight=False)
        else:
            self._write(text)

    def close(self) -> None:
        """Shows the last row if it is still pending, and ends the live line."""
        if self._pending is not None:
            self._write_row(self._pending, self._clock())
        if self._bar.live.is_started:
            self._bar.stop()

    def _count(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"

    def _time_left(
        self, step: int, now: Number, step_s: Number | None
    ) -> Number | None:
        # Averaged since the first row: with evaluations and checkpoints, but without
        # compilation.
        first_step, first_time = self._first or (step, now)
        if step > first_step:
            step_s = (now - first_time) / (step - first_step)
        return None if step_s is None else (self._steps - step) * step_s

    def _write_row(self, line: str, now: Number) -> None:
        self._write(line)
        self._shown_at, self._pending = now, None

    def _write(self, text: str) -> None:
        self._console.file.write(text + "\n")
        self._console.file.flush()


@functools.lru_cache(maxsize=1)
def _console_of(stream: Any) -> Console:
    # With FORCE_COLOR, rich assumes a terminal, and fills a log with cursor movements.
    return Console(file=stream, force_terminal=None if stream.isatty() else False)


def _console(stream: Any) -> Console:
    """Returns the one console of a stream, so that its displays are drawn together."""
    # During a live display, sys.stderr is rich's own file, which prints above it.
    return _console_of(getattr(stream, "rich_proxied_file", stream))


def _display(console: Console, *columns: ProgressColumn) -> Progress:
    # Redirect stdout above the live lines only if it goes to the same terminal.
    return Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())


def _start(bar: Progress) -> None:
    if not bar.live.is_started:
        bar.start()
        # rich hides the cursor, and a second Ctrl-C would end the process without
        # showing it again.
        bar.console.show_cursor(True)
