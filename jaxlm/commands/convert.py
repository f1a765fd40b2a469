"""Convert a checkpoint to another format: jaxlm, Hugging Face or GGUF."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxlm.checkpoint.conversion import convert
from jaxlm.flags import Positional, parse


@dataclass(frozen=True)
class Arguments:
    """Convert a checkpoint to another format: jaxlm, Hugging Face or GGUF."""

    src: Positional[str]
    """A run, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    dst: Positional[Path]
    """The new folder or .gguf file."""
    to: Literal["jaxlm", "hf", "gguf"] | None = None
    """The format; None: gguf if DST ends in .gguf, else hf for a run, else jaxlm."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Dtype of the parameters; None keeps the stored one (f16 in GGUF)."""
    tokenizer: bool = True
    """Also write the tokenizer."""


def main(arguments: Sequence[str], prog: str) -> int:
    """`SRC DST [--to KIND] ...`: converts, and prints the path and format written."""
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
