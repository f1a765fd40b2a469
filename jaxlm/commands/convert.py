"""Write a checkpoint as one of another kind: jaxlm, Hugging Face or GGUF."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from jaxlm.checkpoint.conversion import convert
from jaxlm.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Write a checkpoint as one of another kind: jaxlm, Hugging Face or GGUF."""

    src: tyro.conf.Positional[str]
    """A run, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    dst: tyro.conf.Positional[Path]
    """The new folder or .gguf file."""
    to: Literal["jaxlm", "hf", "gguf"] | None = None
    """The kind; None goes by the name, and turns runs into hf and others into runs."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Of the parameters; None keeps what is stored (f16 in GGUF)."""
    tokenizer: bool = True
    """Write the tokenizer as well."""


def main(arguments: Sequence[str], prog: str) -> int:
    """`SRC DST [--to KIND] ...`: converts and says what was written."""
    chosen = parse(Arguments, arguments, prog=prog)
    kind = convert(
        chosen.src,
        chosen.dst,
        to=chosen.to,
        dtype=chosen.dtype,
        with_tokenizer=chosen.tokenizer,
    )
    print(f"{chosen.dst} ({kind})")
    return 0
