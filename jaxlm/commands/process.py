"""What a command sets up in its process: memory, log, cache of compiled programs."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STARTED = time.monotonic()
"""About when the process began: nothing that takes long is imported before this."""
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
MALLOC_OPTIONS = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=268435456"
)
"""Value of GLIBC_TUNABLES: malloc keeps freed memory, in huge pages."""


def restart_with_malloc_options() -> None:
    """On a CPU, starts this program again with options of glibc's malloc.

    XLA:CPU allocates its buffers anew in each step. With these options malloc keeps the
    memory, in huge pages, instead of giving it back and faulting it in again: a quarter
    of a small model's step. They must be there before Python starts. Returns at once
    where an accelerator is, and where GLIBC_TUNABLES is set.
    """
    if sys.platform != "linux" or any(map(os.path.exists, _ACCELERATORS)):
        return
    if "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = MALLOC_OPTIONS
    os.execv(sys.executable, sys.orig_argv)


class _Stderr(logging.Handler):
    """Plain lines on what sys.stderr is now: progress bars put their own there."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_on_stderr(verbose: bool) -> Iterator[None]:
    """Shows what jaxlm logs: warnings, and with `verbose` what was chosen and why."""
    logger = logging.getLogger("jaxlm")
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers = [_Stderr()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    # Libraries put handlers of their own at the root.
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before


@contextlib.contextmanager
def log_paused() -> Iterator[None]:
    """While a conversation is on the terminal, only errors may interrupt it."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def compile_cache_folder() -> Path:
    """Where compiled programs are kept between runs."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "jaxlm" / "xla"


def use_compile_cache() -> None:
    """Keeps compiled programs in a folder of the user's own, 0700."""
    import jax

    folder = compile_cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A cached program is run without a check, so nobody else may write there.
    folder.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
