"""Programs in processes of their own, without the seconds in which they import JAX.

A server of `multiprocessing` imports the package once and forks for each program, before
a backend exists. Their signals, exit codes and streams are those of any process.
"""

import atexit
import gc
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "jaxlm.cli",
        "jaxlm.commands.train",
        "jaxlm.interp.causes.patching",
        "matplotlib.backends.backend_agg",
        "matplotlib.pyplot",
    ]
)


class Forked:
    """A process that calls `program(*arguments)`, and its output, which is in files.

    Args:
      program: a function of a module; its exit code is that of `sys.exit`.
      output: the files are this path with `.out` and `.err` after it.
      environment: all of its variables. What JAX reads while it is imported is that of
        this process; flags of XLA are read later.
      folder: its current folder.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        *arguments: Any,
        output: Path,
        environment: Mapping[str, str],
        folder: Path,
    ):
        self._files = [Path(f"{output}{suffix}") for suffix in (".out", ".err")]
        for file in self._files:  # of an earlier process
            file.unlink(missing_ok=True)
        self._process = _SERVER.Process(
            target=_run,
            args=(program, arguments, self._files, dict(environment), folder),
        )
        self._process.start()
        self.pid = self._process.pid
        self.kill, self.terminate = self._process.kill, self._process.terminate

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    @property
    def code(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float = 280) -> int | None:
        """Waits for the end and returns `code`, which is None after `timeout_s`."""
        self._process.join(timeout_s)
        return self.code

    def wait_for(self, text: str, timeout_s: float = 280) -> None:
        """Waits until the program has printed a text."""
        end = time.monotonic() + timeout_s
        while not self._files[0].exists() or text not in self.out:
            assert self.code is None and time.monotonic() < end, self.err
            time.sleep(0.02)


def _run(program, arguments, files, environment, folder):
    for number, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # Another process writes the program just now, and JAX compiles it once more.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    # What was imported stays, and need not be looked through again.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    try:
        program(*arguments)
    finally:
        # A process that was forked ends without them.
        sys.stdout.flush()
        atexit._run_exitfuncs()
