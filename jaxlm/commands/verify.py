"""Compare a model with an independent implementation, and with itself."""

from jaxlm.commands.process import use_compile_cache
from jaxlm.flags.arguments import VerifyArguments
from jaxlm.terminal.exit_codes import EXIT_DONE, EXIT_FAILED
from jaxlm.verify.verification import verify, write_certificate


def main(chosen: VerifyArguments) -> int:
    """Prints the table and writes the certificate; returns the exit code."""
    use_compile_cache()
    found = verify(chosen.src, against=chosen.against, num_tokens=chosen.tokens)
    print(found)
    print(write_certificate(found, chosen.out))
    return EXIT_DONE if found.passed else EXIT_FAILED
