"""What opening a checkpoint gives, whichever its kind."""

import sys
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxlm.config import ModelConfig
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

Kind = Literal["jaxlm", "hf", "gguf"]


@runtime_checkable
class Checkpoint(Protocol):
    """One set of weights with its config and tokenizer, opened but not yet read.

    Everything that it gives belongs together. Of a run it is one step, chosen when it
    was opened: steps that the run saves later change nothing.
    """

    kind: Kind
    path: Path
    """What was opened: a folder or a file."""
    config: ModelConfig

    def params(self, *, dtype: Any = None, shardings: Any = None) -> Params:
        """Reads the parameters.

        Args:
          dtype: floating-point parameters are cast to it; None keeps what is stored
            (float32 for quantized tensors).
          shardings: tree of `jax.sharding.Sharding`s in the structure of the
            parameters; None puts them onto the default device.

        Raises:
          ValueError: when they are damaged, or do not fit the config.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer; ValueError when there is none."""
        ...

    def files(self) -> list[Path]:
        """The files whose bytes decide what the parameters and the config are."""
        ...


def print_to_stderr(line: str) -> None:
    """Where warnings go when the caller does not say."""
    print(line, file=sys.stderr, flush=True)
