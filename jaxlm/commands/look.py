"""Look inside a model while it reads a text."""

import dataclasses
import shlex
from pathlib import Path

from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.checkpoint.native.run_folder import newest_run
from jaxlm.commands.process import use_compile_cache
from jaxlm.flags.arguments import LookArguments
from jaxlm.report.inside.inside_page import write_page
from jaxlm.report.inside.measure import view_of
from jaxlm.report.inside.terminal_view import print_view
from jaxlm.terminal.progress import Waiting


def main(chosen: LookArguments) -> int:
    """Writes the page and prints its path, or prints the view in short."""
    use_compile_cache()
    run = newest_run() if chosen.run is None else chosen.run
    checkpoint = open_checkpoint(run)
    model = checkpoint.config
    if chosen.dtype is not None:
        model = dataclasses.replace(model, dtype=chosen.dtype)
    tokenizer = checkpoint.tokenizer()
    prompt, against = tokenizer.encode_prompt(chosen.prompt), None
    if chosen.against is not None:
        against = tokenizer.encode_prompt(chosen.against)
    with Waiting("loading the model"):
        _, params = load(checkpoint)
    call = ["jaxlm", "look", str(run), "--prompt", chosen.prompt]
    if chosen.against is not None:
        call += ["--against", chosen.against]
    with Waiting("looking inside"):
        view = view_of(
            *(model, params, tokenizer, prompt),
            against=against,
            title=Path(run).name,
            call=shlex.join(call),
        )
    if chosen.terminal:
        print_view(view)
    else:
        print(write_page(view, chosen.out))
    return 0
