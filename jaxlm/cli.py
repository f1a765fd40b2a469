"""`jaxlm VERB ...`: runs the command of a verb, and imports no other.

Everything else is imported where it is needed: Ctrl-C ends the program without a
traceback from the moment that `main` runs.
"""

import contextlib
import errno
import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlm.terminal.exit_codes import EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, EXIT_USAGE

# Verb -> what it does. Each is a module of `jaxlm.commands` with a function `main` that
# takes what `read_arguments` returns, and returns an exit code.
VERBS = {
    "train": "Train a language model: from a config to a run folder",
    "sample": "Continue a text with a trained model",
    "chat": "Hold a conversation with a model that was trained to chat",
    "look": "Look inside a model while it reads a text",
    "convert": "Convert a checkpoint to another format: jaxlm, Hugging Face or GGUF",
    "verify": "Compare a model with an independent implementation, and with itself",
    "eval": "Measure how well a model predicts texts, or answers multiple choice",
    "serve": "Answer requests over HTTP, as OpenAI's API does",
    "report": "Plot one run, or compare several: an HTML page and a PNG",
    "tune": "Measure block sizes of attention on this device, and save the best",
    "doctor": "Show versions, devices, and the attention that a config would use",
}
# Never the value of another option: as with every flag, a value that begins with a dash
# is joined to its option, as in `--prompt=-v`.
_VERBOSE = ("-v", "--verbose")
_VERSION = ("-V", "--version")
# `sample --chat` is `chat`.
_CHAT = "--chat"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `jaxlm VERB ...` and returns its exit code; None takes `sys.argv`."""
    if arguments is None:
        start(sys.argv[1:2] == ["train"])
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("", "-h", "--help"):
        print("usage: jaxlm VERB ...   (jaxlm VERB --help lists its flags)\n")
        for name, summary in VERBS.items():
            print(f"  {name:8} {summary}")
        print("\nWith -v or --verbose each also reports what it chose and why.")
        return 0 if verb else EXIT_USAGE
    if verb in _VERSION:
        from importlib.metadata import version

        print(f"jaxlm {version('jaxlm')}")
        return 0
    if verb not in VERBS:
        from jaxlm.commands.process import fail
        from jaxlm.fields import nearest

        near, verbs = nearest(verb, list(VERBS)), ", ".join(VERBS)
        fail(f"no verb {verb!r}{near}; verbs: {verbs}")
    return run(verb, rest, f"jaxlm {verb}")


def start(trains: bool) -> None:
    """Sets up the process of a program, before anything that takes time is imported.

    Outside of the command that `run` calls, Ctrl-C ends the program at once.

    Args:
      trains: whether it is a training run, which sets options of malloc.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from jaxlm.commands.process import (
        open_standard_streams,
        restart_with_malloc_options,
    )

    open_standard_streams()
    if trains:
        restart_with_malloc_options()


def _end(_number: int, _frame: Any) -> None:
    os._exit(EXIT_INTERRUPTED)


# Packages of the extra `serve`.
_SERVING = ("uvicorn", "starlette", "prometheus_client")


def run(verb: str, arguments: Sequence[str], prog: str, **options: Any) -> int:
    """Runs a verb and returns its exit code.

    A ValueError or an OSError becomes one line on stderr, in which fields of the config
    are named by their flags; with -v its traceback comes before it. Training goes on
    when nobody can read what it prints.

    Args:
      verb: a name in `VERBS`.
      arguments: the arguments after the verb.
      prog: the program that the user called, for messages.
      options: passed to the verb's `main`.
    """
    from jaxlm.commands.process import fail, lossy_output

    with lossy_output(stdout=verb == "train"):
        try:
            return _run(verb, arguments, prog, options)
        except ModuleNotFoundError as error:
            package = (error.name or "jaxlm").partition(".")[0]
            if package == "jaxlm":
                raise
            if verb == "serve" and package in _SERVING:
                fail("jaxlm serve needs the extra serve: pip install 'jaxlm[serve]'")
            fail(
                f"{sys.executable} has no package {error.name}: activate the "
                "environment of jaxlm (source .venv/bin/activate), or install it "
                "(pip install -e .)"
            )


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """A command starts with a third less CPU time; what imports left stays."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()


def _run(verb: str, arguments: Sequence[str], prog: str, options: Any) -> int:
    from jaxlm.commands.process import (
        discard_stdout,
        fail,
        is_of_devices,
        log_on_stderr,
    )
    from jaxlm.flags.arguments import ARGUMENTS, read_arguments
    from jaxlm.flags.config_file import ConfigFileError
    from jaxlm.flags.flag_table import in_flags
    from jaxlm.terminal.interrupts import Interrupts
    from jaxlm.terminal.printable import error_line
    from jaxlm.terminal.progress import Waiting

    rest = [a for a in arguments if a not in _VERBOSE]
    verbose = len(rest) < len(arguments)
    if verb == "sample" and _CHAT in rest:
        rest.remove(_CHAT)
        verb, prog = "chat", f"{prog} {_CHAT}"
    try:
        with log_on_stderr(verbose):
            with _without_collections():
                chosen = read_arguments(verb, rest, prog)
                with Waiting("starting", in_logs=False):
                    command = importlib.import_module(f"jaxlm.commands.{verb}")
            with Interrupts({signal.SIGINT: EXIT_INTERRUPTED}):
                code = command.main(*chosen, **options)
            sys.stdout.flush()
            return code
    except ValueError as error:
        if verbose:
            import traceback

            traceback.print_exc()
        is_of_file = isinstance(error, ConfigFileError)
        fail(
            error if is_of_file else in_flags(str(error), ARGUMENTS[verb]),
            getattr(error, "exit_code", EXIT_USAGE),
        )
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # As in `| head`.
        discard_stdout()
        return EXIT_PIPE_CLOSED
    except OSError as error:
        if verbose:
            import traceback

            traceback.print_exc()
        if error.filename:
            fail(f"{error.filename}: {error.strerror}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            discard_stdout()  # Files have names.
            fail(f"the output cannot be written ({error.strerror})")
        fail(error)
    except MemoryError as error:
        fail(f"the memory of this process is not enough ({error_line(error)})")
    except (RuntimeError, AssertionError) as error:
        words = error_line(error)
        if words.startswith("RESOURCE_EXHAUSTED"):  # XLA's
            fail(f"the memory of a device is not enough ({words})")
        if not is_of_devices(error):
            raise
        platforms = os.environ.get("JAX_PLATFORMS", "")
        fail(
            f"JAX finds no device with JAX_PLATFORMS={platforms!r} "
            f"({words}): unset it, or install JAX for that device"
        )


if __name__ == "__main__":
    sys.exit(main())
