"""The report and the picture of a run, kept up to date while it trains."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.report import PICTURE, REPORT
from jaxlm.report.curves import load_runs
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png
from jaxlm.terminal.printable import error_line
from jaxlm.terminal.progress import Waiting

# Seconds after which a training row is shown; what is rarer is shown at once.
EVERY_S = 15.0
# All writes together take at most this share of the run, and these seconds before it.
MAX_SHARE = 0.01
ALLOWANCE_S = 0.5

logger = logging.getLogger(__name__)


class LiveReport:
    """Writes both files at evaluations, samples and now and then; a `metrics.Sink`.

    The page is there from the start. Both are replaced as a whole, so a reader never
    finds half of one. The page reloads itself until the last one, which `close` writes.
    A failure is logged once, and the next write tries again.
    """

    def __init__(
        self, run_dir: Path | str, clock: Callable[[], float] = time.monotonic
    ):
        self._run = Path(run_dir)
        self._clock = clock
        self._began = self._written = clock()
        self._spent: float | None = None
        self._failed = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row that `metrics.jsonl` already has."""
        now = self._clock()
        if row["kind"] == "event":  # such as the start: nothing new to draw
            self._update(next_s=EVERY_S, draw=False)
            return
        rare = row["kind"] in ("eval", "sample", "look")
        if not (rare or now - self._written >= EVERY_S):
            return
        if (self._spent or 0.0) > ALLOWANCE_S + MAX_SHARE * (now - self._began):
            return
        # A run whose rows are far apart is written as rarely.
        self._update(next_s=max(EVERY_S, now - self._written))
        self._written = self._clock()
        # The first write includes the import of matplotlib, which does not come again.
        self._spent = 0.0 if self._spent is None else self._spent + self._written - now

    def close(self, failed: bool = False) -> None:
        """Writes the files for the last time, however the run ended."""
        self._update(next_s=None)

    def _update(self, next_s: float | None, draw: bool = True) -> None:
        with Waiting("drawing the report", in_logs=False), self._failure_logged():
            runs = load_runs(self._run)
            with self._failure_logged():
                write_report(runs, self._run / REPORT, next_s=next_s)
            if draw:
                draw_loss_png(runs, self._run / PICTURE)

    @contextlib.contextmanager
    def _failure_logged(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Whatever it is, it must not end the run or hide why it ended.
            if not self._failed:
                logger.warning("the report cannot be written: %s", error_line(error))
            self._failed = True
