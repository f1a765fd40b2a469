"""Convert a checkpoint to another format: jaxlm, Hugging Face or GGUF."""

from jaxlm.checkpoint.conversion import convert
from jaxlm.flags.arguments import ConvertArguments


def main(chosen: ConvertArguments) -> int:
    """Converts, and prints the path and format written; returns the exit code."""
    kind = convert(
        chosen.src,
        chosen.dst,
        to=chosen.to,
        dtype=chosen.dtype,
        with_tokenizer=chosen.tokenizer,
    )
    print(f"{chosen.dst} ({kind})")
    return 0
