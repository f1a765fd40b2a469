"""Progress on standard error: bars, waits and the line of a training run.

On a terminal, rich draws them below each other, and other output appears above them.
Elsewhere (a pipe, a log, `TERM=dumb`) plain lines are printed.
"""

import contextlib
import functools
import io
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from jaxlm.terminal.printable import printable

# Shorter work shows no progress bar, a shorter wait no line.
DELAY_SECONDS = 2.0
WAIT_SECONDS = 1.0
# Width of a training run's bar, in characters.
BAR_WIDTH = 20

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


def format_row(
    row: Mapping[str, Any], left_s: Number | None = None, width: int | None = None
) -> str:
    """Formats `loss 2.314 lr 1.9e-02 41.2k tok/s MFU 31% wait 0% 3:12 left`.

    Args:
      row: a training row (`metrics.FIELDS`); fields that are missing or None are left
        out.
      left_s: seconds left.
      width: characters that there is room for: without room for all figures, the less
        important ones are left out. None: any number.
    """
    parts = {}
    if (loss := row.get("loss")) is not None:
        parts["loss"] = f"loss {loss:.3f}" if abs(loss) < 1e4 else f"loss {loss:.2e}"
    if (lr := row.get("lr")) is not None:
        parts["lr"] = f"lr {lr:.1e}"
    if (rate := row.get("tokens_per_s")) is not None:
        parts["rate"] = f"{format_count(rate)} tok/s"
    if (mfu := row.get("mfu")) is not None and math.isfinite(mfu):
        parts["mfu"] = f"MFU {100 * mfu:.{1 if 0 < mfu < 0.0995 else 0}f}%"
    if row.get("step_s") and "data_wait_s" in row:
        parts["wait"] = f"wait {100 * row['data_wait_s'] / row['step_s']:.0f}%"
    if left_s is not None:
        parts["left"] = f"{format_seconds(left_s)} left"
    for name in ("wait", "mfu", "lr", "rate", "left", "loss"):
        if width is None or len(" ".join(parts.values())) <= width:
            break
        parts.pop(name, None)
    return " ".join(parts.values())


class _Rate(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Returns the rate, or nothing before there is one."""
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, unit: str | None = None
) -> Iterator[Callable[[int], None]]:
    """Shows rate and remaining time, once the work has taken two seconds.

    Args:
      title: what is done and where the result goes.
      total: bytes of all the work, or their number.
      unit: what is counted, in the plural; None: bytes.

    Yields:
      A function to call with the number of bytes, or of units, done so far.
    """
    if unit is None:
        figures = DownloadColumn(binary_units=True), TransferSpeedColumn()
    else:
        count = TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}")
        figures = count, _Rate(unit)
    bar = _display(
        _console(sys.stderr),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *figures,
        TimeRemainingColumn(),
    )
    task = bar.add_task(title, total=total)
    began = time.monotonic()

    def advance_to(done: int) -> None:
        if time.monotonic() - began > DELAY_SECONDS:
            _start(bar.live)
        bar.update(task, completed=min(done, total))

    try:
        yield advance_to
    finally:
        if bar.live.is_started:
            bar.stop()


class Waiting(contextlib.AbstractContextManager):
    """Says what a wait of unknown length is for: `compiling ... 3 s`.

    It begins when this is made, and shows nothing at first. On a terminal, a line then
    counts the seconds by itself, while the main thread computes or compiles, and is
    gone at the end. Elsewhere a plain line is printed, and at the end one with the
    seconds. Use it as a context manager, or call `finish`.
    """

    def __init__(self, title: str, *, in_logs: bool = True):
        """Begins to count the seconds.

        Args:
          title: what is done, without a period.
          in_logs: print the plain lines; False for a wait that comes again and again.
        """
        self._title, self._began = title, time.monotonic()
        self._console: Console = _console(sys.stderr)
        self._live: Live | None = None
        self._lock, self._is_shown, self._is_over = threading.Lock(), False, False
        self._timer = threading.Timer(WAIT_SECONDS, self._show)
        self._timer.daemon = True
        if in_logs or self._console.is_interactive:
            self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_shown = True
            if not self._console.is_interactive:
                _write(self._console, f"{self._title} ...")
                return
            self._live = Live(
                console=self._console,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
                get_renderable=lambda: Text(
                    f"{self._title} ... {int(self._seconds())} s"
                ),
            )
            _start(self._live)

    def finish(self) -> None:
        """Ends the wait, and removes its line; a second call does nothing."""
        self._timer.cancel()
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            if self._live is not None:
                self._live.stop()
            elif self._is_shown:
                _write(self._console, f"{self._title} ... {self._seconds():.1f} s")

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def __exit__(self, *exception: object) -> None:
        self.finish()


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
            # On a narrow terminal the bar shrinks; `format_row` chooses the figures.
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
        left, count = self._time_left(step, now, row.get("step_s")), self._count(step)
        if self._live:
            figures = format_row(row, left, self._console.width - len(count) - 1)
            self._bar.update(
                self._task, completed=step, description=count, figures=figures
            )
            _start(self._bar.live)
            return
        filled = BAR_WIDTH * step // self._steps
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        self._pending = f"{count} [{bar}] {format_row(row, left)}"
        if now - self._shown_at >= self._every_s or step >= self._steps:
            self._write_row(self._pending, now)

    def note(self, text: str) -> None:
        """Prints text above the live line, without control characters."""
        text = printable(text)
        if self._live:
            self._console.out(text, highlight=False)
        else:
            _write(self._console, text)

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
        _write(self._console, line)
        self._shown_at, self._pending = now, None


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leaves the cursor: a second Ctrl-C ends the process without showing it."""
        return False

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints while no thread redraws the live lines.

        rich computes how far to move the cursor up before it writes. If a redraw of
        fewer lines comes between, it erases lines above them.
        """
        with self._no_redraw():
            super().print(*objects, **options)

    def out(self, *objects: Any, **options: Any) -> None:
        with self._no_redraw():
            super().out(*objects, **options)

    def _no_redraw(self) -> contextlib.AbstractContextManager:
        lives = self._live_stack
        return lives[0]._lock if lives else contextlib.nullcontext()


@functools.lru_cache(maxsize=1)
def _console_of(stream: Any) -> Console:
    # With FORCE_COLOR, rich assumes a terminal, and fills a log with cursor movements.
    return _Console(file=stream, force_terminal=None if stream.isatty() else False)


def _console(stream: Any) -> Console:
    """Returns the one console of a stream, so that its displays are drawn together."""
    # During a live display, sys.stderr is rich's own file, which prints above it.
    return _console_of(getattr(stream, "rich_proxied_file", stream))


def _display(console: Console, *columns: ProgressColumn) -> Progress:
    # Redirect stdout above the live lines only if it goes to the same terminal.
    return Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())


def _write(console: Console, line: str) -> None:
    """Writes a line as it is, without wrapping it."""
    console.file.write(line + "\n")
    console.file.flush()


def _start(live: Live) -> None:
    if not live.is_started:
        live.start(refresh=True)
