"""The one line that shows how far a run is."""

import io
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# A type checker that runs does not take whole numbers for float.
Number = float | int


def format_count(value: Number) -> str:
    """A count in four characters or so: 950, 41.2k, 3.1M, 120B; '-' if not finite."""
    if not math.isfinite(value):
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: Number) -> str:
    """A span of time: 0:07, 3:12, 1:02:03, 2d 03h; '-' if not finite."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    if hours:
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{rest // 60}:{rest % 60:02d}"


def format_progress(
    *,
    step: int,
    steps: int,
    loss: Number | None = None,
    lr: Number | None = None,
    tokens_per_s: Number | None = None,
    mfu: Number | None = None,
    data_wait: Number | None = None,
    eta_s: Number | None = None,
    width: int = 100,
) -> str:
    """`step  120/2000 [#--] loss 2.314 lr 1.9e-02 41.2k tok/s MFU 31% wait 0% eta 3:12`

    Args:
      step, steps: steps done, and of the whole run.
      loss: nats per token.
      lr: learning rate.
      tokens_per_s: tokens per second.
      mfu: share of the peak FLOP/s, 0 to 1.
      data_wait: share of a step's time spent waiting for data, 0 to 1.
      eta_s: seconds left.
      width: columns; the bar shrinks and then the line is cut to fit.
    """
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.3f}" if abs(loss) < 1e4 else f"loss {loss:.2e}")
    if lr is not None:
        parts.append(f"lr {lr:.1e}")
    if tokens_per_s is not None:
        parts.append(f"{format_count(tokens_per_s)} tok/s")
    for name, share in (("MFU", mfu), ("wait", data_wait)):
        if share is not None and math.isfinite(share):
            digits = 1 if 0 < share < 0.0995 and name == "MFU" else 0
            parts.append(f"{name} {100 * share:.{digits}f}%")
    if eta_s is not None:
        parts.append(f"eta {format_seconds(eta_s)}")
    count = f"step {step:>{len(str(steps))}}/{steps}"
    room = width - len(count) - sum(len(p) + 1 for p in parts) - 3
    cells = min(20, room)
    if cells >= 4:
        done = min(cells, int(cells * step / steps)) if steps else cells
        parts.insert(0, f"[{'#' * done}{'-' * (cells - done)}]")
    return " ".join([count, *parts])[:width]


class ProgressLine:
    """Shows training rows as they come, on stderr.

    On a terminal one line is rewritten in place. Elsewhere (a file, a pipe) plain lines
    come at most every `every_s` seconds, and the first and the last in any case.
    """

    def __init__(
        self,
        steps: int,
        *,
        stream: io.TextIOBase | None = None,
        every_s: Number = 10.0,
        clock: Callable[[], Number] = time.monotonic,
    ):
        """`steps` of the whole run; `clock` gives seconds."""
        self._steps = steps
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._every_s = 0.1 if self._live else every_s
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._shown_at = -math.inf
        self._line = ""
        self._pending = False

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes a training row (`metrics.FIELDS`) and shows it when it is time."""
        now, step = self._clock(), row["step"]
        if self._first is None:
            self._first = (step, now)
        step_s = row.get("step_s")
        wait = row["data_wait_s"] / step_s if step_s and "data_wait_s" in row else None
        self._line = format_progress(
            step=step,
            steps=self._steps,
            loss=row.get("loss"),
            lr=row.get("lr"),
            tokens_per_s=row.get("tokens_per_s"),
            mfu=row.get("mfu"),
            data_wait=wait,
            eta_s=self._time_left(step, now, step_s),
            width=self._width(),
        )
        self._pending = True
        if now - self._shown_at >= self._every_s or step >= self._steps:
            self._show(now)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live line."""
        self._print(("\r\x1b[K" if self._live else "") + text + "\n")
        if self._live and self._line:
            self._show(self._clock())

    def close(self) -> None:
        """Shows the last row if it was held back, and ends the live line."""
        if self._pending:
            self._show(self._clock())
        if self._live and self._line:
            self._print("\n")
        self._line = ""

    def _time_left(
        self, step: int, now: Number, step_s: Number | None
    ) -> Number | None:
        # Since the first row, so with evaluations and checkpoints, without compiling.
        first_step, first_time = self._first or (step, now)
        if step > first_step:
            step_s = (now - first_time) / (step - first_step)
        return None if step_s is None else (self._steps - step) * step_s

    def _width(self) -> int:
        if not self._live:
            return 100
        # One column less: a full row makes some terminals go to the next one.
        return min(100, shutil.get_terminal_size((100, 24)).columns - 1)

    def _show(self, now: Number) -> None:
        self._print(f"\r{self._line}\x1b[K" if self._live else self._line + "\n")
        self._shown_at, self._pending = now, False

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
