"""Sets up the process of a command: malloc, logging, the compile cache."""

import contextlib
import io
import logging
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jaxlm.files.checksums import Checksums
from jaxlm.files.user_cache import user_cache
from jaxlm.terminal.exit_codes import EXIT_USAGE
from jaxlm.terminal.printable import one_line
from jaxlm.terminal.room import has_room

STARTED = time.monotonic()
"""About the start of the process: nothing slow is imported before this."""
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
PATIENCE_SECONDS = 5.0
"""How long a reader of what is printed may read nothing; then lines are lost."""
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event after a program was compiled and cached."""
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
MALLOC_OPTIONS = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=268435456"
)
"""Value of GLIBC_TUNABLES that makes malloc keep freed memory, in huge pages."""

logger = logging.getLogger(__name__)


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


class _Lossy(io.FileIO):
    """Drops what cannot be written: the reader is gone or stopped, the disk is full."""

    _wait_seconds = PATIENCE_SECONDS

    def write(self, data: Any) -> int:
        # A write to a full pipe would stop the program, and a signal not end it.
        if not has_room(self.fileno(), self._wait_seconds):
            self._wait_seconds = 0.0
            return len(data)
        self._wait_seconds = PATIENCE_SECONDS
        with contextlib.suppress(OSError):
            # A pipe with room takes as much at once.
            return super().write(data[: select.PIPE_BUF]) or len(data)
        return len(data)


def _lossy(stream: Any) -> Any:
    # Tests and notebooks have streams of their own.
    own = stream is sys.__stdout__ or stream is sys.__stderr__
    if stream is None or not own:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(stream.fileno(), "w", closefd=False)),
        stream.encoding,
        "backslashreplace",
        line_buffering=True,
    )


@contextlib.contextmanager
def lossy_output(*, stdout: bool) -> Iterator[None]:
    """Loses what cannot be written to stderr, and to `stdout`, instead of failing."""
    old = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lossy(old[0]) if stdout else old[0], _lossy(old[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = old


def open_standard_streams() -> None:
    """Opens /dev/null for each standard stream that was closed before the start.

    Otherwise the next file would get its number, and messages would be written there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            os.set_inheritable(number, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def discard_stdout() -> None:
    """Drops what is left for stdout, which Python would try to write again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_of_devices(error: BaseException) -> bool:
    """Whether JAX raised this error because it found none of the requested devices.

    It is a RuntimeError, or for a missing GPU an AssertionError without a message.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return bool(last and last.name == "backends" and "xla_bridge" in last.filename)


def fail(error: Exception | str, code: int = EXIT_USAGE) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"error: {one_line(str(error))}", file=sys.stderr)
    raise SystemExit(code)


class _Stderr(logging.Handler):
    """Writes plain lines to the current sys.stderr, which progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.levelno >= logging.WARNING and not record.exc_info:
            line = one_line(line)
        print(line, file=sys.stderr, flush=True)


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


def compile_cache_folder() -> str:
    """Returns the folder of compiled programs; JAX takes URLs, such as gs://, too."""
    return os.environ.get(CACHE_VARIABLE) or str(user_cache() / "xla")


def use_compile_cache() -> None:
    """Caches compiled programs in a folder of the user, mode 0700.

    Where that cannot be used, it warns, and nothing is cached. Damaged programs are
    removed first, as JAX would run them. A folder that JAX_COMPILATION_CACHE_DIR names,
    which may be shared by hosts, is used as it is.
    """
    import jax

    if os.environ.get(CACHE_VARIABLE):
        return
    try:
        folder = Path(compile_cache_folder())
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Cached programs run unchecked, so nobody else may write there.
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        checksums = Checksums(folder, "-cache")
        if damaged := checksums.remove_damaged():
            logger.warning(
                "%s: %d compiled programs were damaged, and are made again",
                *(folder, damaged),
            )
    except OSError as error:
        logger.warning(
            "compiled programs are not kept: %s (%s); each start compiles again",
            *(error.filename, error.strerror),
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def record(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILED:
            with contextlib.suppress(OSError):  # Not recorded, it is not used again.
                checksums.record_new()

    jax.monitoring.register_event_duration_secs_listener(record)
