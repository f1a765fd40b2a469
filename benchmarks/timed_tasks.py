"""Seconds and peak memory of tasks. Imports nothing but Python's own."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPEATS = 3


class Task(NamedTuple):
    """What is timed: the least of its repeats, after a warm call."""

    run: Callable[[], Any]
    repeats: int = REPEATS
    warm: bool = True
    """Whether a first call that is not counted comes before."""


def measured(tasks: dict[str, Task]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the figures of each task, and what it returned last.

    `peak_mib` is the process's largest resident memory during the timed calls, with the
    model and libraries; `before_mib` is what it held before them.
    """
    figures, results = {}, {}
    for name, task in tasks.items():
        start = time.perf_counter()
        if task.warm:
            task.run()
        first = time.perf_counter() - start
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        seconds = []
        for _ in range(task.repeats):
            start = time.perf_counter(), time.process_time()
            results[name] = task.run()
            end = time.perf_counter(), time.process_time()
            seconds.append([b - a for a, b in zip(start, end, strict=True)])
        wall, processor = min(seconds)
        print(f"{name}: {wall:.3f} s", file=sys.stderr)
        figures[name] = {
            "warm_call_s": round(first, 3),
            "wall_s": round(wall, 4),
            "processor_s": round(processor, 4),
            "before_mib": before,
            "peak_mib": _resident("VmHWM"),
        }
    return figures, results


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith(field))
    return int(line.split()[1]) >> 10
