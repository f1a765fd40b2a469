"""`jaxlm VERB ...`: finds the verb's command, and imports only that one."""

import importlib
import sys
from collections.abc import Sequence

from jaxlm.commands.process import log_on_stderr, restart_with_malloc_options
from jaxlm.config import nearest
from jaxlm.flags import fail
from jaxlm.train.stopping import EXIT_INTERRUPTED, EXIT_USAGE

# Verb -> what it does. Each is a module of `jaxlm.commands` with
# `main(arguments, prog)`, which returns an exit code.
VERBS = {
    "train": "Train a language model: from a config to a run folder",
    "sample": "Continue a text with a trained model, or hold a conversation with it",
    "convert": "Write a checkpoint as one of another kind: jaxlm, Hugging Face or GGUF",
    "verify": "Compare a model with an independent implementation, and with itself",
    "report": "Draw one run, or several over each other: an HTML page and a PNG",
    "tune": "Measure block sizes of attention on this device, and keep the best ones",
    "doctor": "Say what this machine has, and what jaxlm would use of it for a config",
}
_VERBOSE = ("-v", "--verbose")


def main(arguments: Sequence[str] | None = None) -> int:
    """`jaxlm VERB ...`; None takes the command line of this process."""
    if arguments is None and sys.argv[1:2] == ["train"]:
        restart_with_malloc_options()
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("", "-h", "--help"):
        print("usage: jaxlm VERB ...   (jaxlm VERB --help tells more)\n")
        for name, summary in VERBS.items():
            print(f"  {name:10} {summary}")
        print("\nWith -v or --verbose each also says what it chose, and why.")
        return 0 if verb else EXIT_USAGE
    if verb not in VERBS:
        fail(f"no verb {verb!r}{nearest(verb, list(VERBS))}; verbs: {', '.join(VERBS)}")
    return run(verb, rest, f"jaxlm {verb}")


def run(verb: str, arguments: Sequence[str], prog: str) -> int:
    """Runs a verb and returns its exit code; a ValueError becomes one line.

    Args:
      verb: a name in `VERBS`.
      arguments: the command line behind it.
      prog: what the user called, for messages.
    """
    rest = [a for a in arguments if a not in _VERBOSE]
    try:
        with log_on_stderr(verbose=len(rest) < len(arguments)):
            command = importlib.import_module(f"jaxlm.commands.{verb}")
            return command.main(rest, prog)
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
