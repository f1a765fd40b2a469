"""The interface of an opened checkpoint of any kind."""

import sys
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxlm.config import ModelConfig
from jaxlm.terminal.printable import one_line
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

Kind = Literal["jaxlm", "hf", "gguf"]


@runtime_checkable
class Checkpoint(Protocol):
    """One set of weights with its config and tokenizer, opened but not yet read.

    All of it belongs together. For a run it is one step, chosen when the run was
    opened: steps that are saved later do not change it.
    """

    kind: Kind
    path: Path
    """What was opened: a folder or a file."""
    config: ModelConfig
    family: str
    """What its files call the architecture: "llama"; "jaxlm" for a run."""

    def params(self, *, dtype: Any = None, shardings: Any = None) -> Params:
        """Reads the parameters.

        Args:
          dtype: floating-point parameters are cast to it; None keeps the stored dtype
            (float32 for quantized tensors).
          shardings: tree of `jax.sharding.Sharding`s, structured as the parameters;
            None puts them on the default device.

        Raises:
          ValueError: if they are damaged, or do not match the config.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer; raises ValueError if there is none."""
        ...

    def files(self) -> list[Path]:
        """Lists the files whose bytes determine the parameters and the config."""
        ...


def print_to_stderr(line: str) -> None:
    """Prints a warning to stderr: the default `report` of all readers."""
    print(one_line(line), file=sys.stderr, flush=True)
