"""Compare a model with an independent implementation, and with itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.commands.process import use_compile_cache
from jaxlm.flags import Positional, parse
from jaxlm.verify.verification import NUM_TOKENS, verify, write_certificate

EXIT_PASSED = 0
# A check exceeds its limit.
EXIT_FAILED = 1


@dataclass(frozen=True)
class Arguments:
    """Compare a model with transformers or its recorded values, and with itself."""

    src: Positional[str]
    """A run, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    against: str | None = None
    """A Hugging Face folder or .gguf file for transformers to read, or a certificate
    (.json) of another copy; None: SRC in transformers, else SRC's own certificate."""
    tokens: int = NUM_TOKENS
    """Length of the text, at most the model's context."""
    out: Path | None = None
    """Path of the certificate; None: beside the checkpoint."""


def main(arguments: Sequence[str], prog: str) -> int:
    """`SRC [--against OTHER] ...`: prints the table and writes the certificate."""
    chosen = parse(Arguments, arguments, prog=prog)
    if chosen.out is not None and not chosen.out.parent.is_dir():
        raise ValueError(f"--out {chosen.out}: {chosen.out.parent} is not a folder")
    use_compile_cache()
    found = verify(chosen.src, against=chosen.against, num_tokens=chosen.tokens)
    print(found)
    print(write_certificate(found, chosen.out))
    return EXIT_PASSED if found.passed else EXIT_FAILED
