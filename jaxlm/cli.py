"""`jaxlm VERB ...`: runs the command of a verb, and imports no other."""

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from jaxlm.commands.process import log_on_stderr, restart_with_malloc_options
from jaxlm.config import nearest
from jaxlm.flags import fail
from jaxlm.train.stopping import EXIT_INTERRUPTED, EXIT_USAGE

# Verb -> what it does. Each is a module of `jaxlm.commands` with a function
# `main(arguments, prog)` that returns an exit code.
VERBS = {
    "train": "Train a language model: from a config to a run folder",
    "sample": "Continue a text with a trained model",
    "chat": "Hold a conversation with a model that was trained to chat",
    "convert": "Convert a checkpoint to another format: jaxlm, Hugging Face or GGUF",
    "verify": "Compare a model with an independent implementation, and with itself",
    "report": "Plot one run, or compare several: an HTML page and a PNG",
    "tune": "Measure block sizes of attention on this device, and save the best ones",
    "doctor": "Show versions and devices, and the attention that a config would use",
}
# Never the value of another option: as with every flag, a value that begins with a dash
# is joined to its option, as in `--prompt=-v`.
_VERBOSE = ("-v", "--verbose")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `jaxlm VERB ...` and returns its exit code; None takes `sys.argv`."""
    if arguments is None and sys.argv[1:2] == ["train"]:
        restart_with_malloc_options()
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("", "-h", "--help"):
        print("usage: jaxlm VERB ...   (jaxlm VERB --help lists its options)\n")
        for name, summary in VERBS.items():
            print(f"  {name:10} {summary}")
        print("\nWith -v or --verbose each also reports what it chose and why.")
        return 0 if verb else EXIT_USAGE
    if verb not in VERBS:
        fail(f"no verb {verb!r}{nearest(verb, list(VERBS))}; verbs: {', '.join(VERBS)}")
    return run(verb, rest, f"jaxlm {verb}")


def run(verb: str, arguments: Sequence[str], prog: str, **options: Any) -> int:
    """Runs a verb and returns its exit code.

    A ValueError becomes one line on stderr; with -v its traceback comes before it.

    Args:
      verb: a name in `VERBS`.
      arguments: the arguments after the verb.
      prog: the program that the user called, for messages.
      options: passed to the verb's `main`.
    """
    rest = [a for a in arguments if a not in _VERBOSE]
    verbose = len(rest) < len(arguments)
    try:
        with log_on_stderr(verbose):
            command = importlib.import_module(f"jaxlm.commands.{verb}")
            return command.main(rest, prog, **options)
    except ValueError as error:
        if verbose:
            traceback.print_exc()
        fail(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
