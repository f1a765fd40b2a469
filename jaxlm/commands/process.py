"""Sets up the process of a command: malloc, logging, the compile cache."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from jaxlm.train.stopping import EXIT_USAGE

STARTED = time.monotonic()
"""About the start of the process: nothing slow is imported before this."""
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
MALLOC_OPTIONS = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=268435456"
)
"""Value of GLIBC_TUNABLES that makes malloc keep freed memory, in huge pages."""


def restart_with_malloc_options() -> None:
    """Restarts this program with `MALLOC_OPTIONS` if it runs on a CPU.

    XLA:CPU allocates its buffers again in each step. With these options malloc keeps
    the memory, in huge pages, instead of unmapping it and faulting it in again, which
    takes a quarter of a small model's step. They must be set before Python starts.
    Does nothing if there is an accelerator or GLIBC_TUNABLES is set.
    """
    if sys.platform != "linux" or any(map(os.path.exists, _ACCELERATORS)):
        return
    if "GLIBC_TUNABLES" in os.environ:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return
    # A Ctrl-C waits until the restarted program can answer it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ["GLIBC_TUNABLES"] = MALLOC_OPTIONS
    os.execv(sys.executable, sys.orig_argv)


def fail(error: Exception | str, code: int = EXIT_USAGE) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


class _Stderr(logging.Handler):
    """Writes plain lines to the current sys.stderr, which progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_on_stderr(verbose: bool) -> Iterator[None]:
    """Writes jaxlm's log to stderr: warnings, and with `verbose` also INFO."""
    logger = logging.getLogger("jaxlm")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers = [_Stderr()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    # Libraries add handlers of their own to the root logger.
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before


@contextlib.contextmanager
def log_paused() -> Iterator[None]:
    """Logs only errors, so that nothing else interrupts a conversation."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def compile_cache_folder() -> Path:
    """Returns the folder of compiled programs."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "jaxlm" / "xla"


def use_compile_cache() -> None:
    """Caches compiled programs in a folder of the user, mode 0700."""
    import jax

    folder = compile_cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Cached programs run unchecked, so nobody else may write there.
    folder.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
