"""A progress bar on standard error for work that turns out to be slow."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Work that ends sooner than this shows nothing.
PATIENCE_SECONDS = 2.0


@contextlib.contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows rate and time left once the work has taken two seconds.

    Args:
      title: what is done and where the result goes.
      total_bytes: bytes of all the work.

    Yields:
      A function to call with the number of bytes done so far.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
    task = bar.add_task(title, total=total_bytes)
    began = time.monotonic()

    def advance_to(done: int) -> None:
        if not bar.live.is_started and time.monotonic() - began > PATIENCE_SECONDS:
            bar.start()
        bar.update(task, completed=min(done, total_bytes))

    try:
        yield advance_to
    finally:
        if bar.live.is_started:
            bar.stop()


@contextlib.contextmanager
def spinner(title: str) -> Iterator[Callable[[], None]]:
    """Shows that work of unknown length goes on, and for how long.

    Yields:
      A function to call now and then; the spinner appears after two seconds.
    """
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
    )
    bar.add_task(title, total=None)
    began = time.monotonic()

    def tick() -> None:
        if not bar.live.is_started and time.monotonic() - began > PATIENCE_SECONDS:
            bar.start()

    try:
        yield tick
    finally:
        if bar.live.is_started:
            bar.stop()
