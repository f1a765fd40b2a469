"""What commands that generate text share: models, stop tokens and proposers."""

import dataclasses
import sys
from pathlib import Path

from jaxlm.checkpoint.load import load_onto_mesh, open_checkpoint
from jaxlm.checkpoint.native.run_folder import newest_run
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.flags.arguments import GenerationArguments
from jaxlm.infer.speculative.proposals import DraftModel, PromptLookup, Proposer
from jaxlm.tokenizers.base import Tokenizer


def open_model(chosen: GenerationArguments) -> tuple[Checkpoint, ModelConfig]:
    """Opens the checkpoint of RUN, or of the newest run, and applies `--dtype`."""
    run = chosen.run
    if run is None:
        run = newest_run()
        print(f"sampling from {run}, the newest run", file=sys.stderr, flush=True)
    return open_with_dtype(run, chosen.dtype)


def open_with_dtype(
    run: Path | str, dtype: str | None
) -> tuple[Checkpoint, ModelConfig]:
    """Opens a checkpoint; returns its config with another dtype unless it is None."""
    checkpoint = open_checkpoint(run)
    model = checkpoint.config
    if dtype is not None:
        model = dataclasses.replace(model, dtype=dtype)
    return checkpoint, model


def with_stop_ids(sample: SampleConfig, tokenizer: Tokenizer) -> SampleConfig:
    """Takes the stop tokens of the tokenizer if the user gave none."""
    return dataclasses.replace(sample, stop_ids=sample.stop_ids or tokenizer.stop_ids)


def read_proposer(
    speculate: str | None, dtype: str | None, tokenizer: Tokenizer
) -> Proposer | None:
    """Returns what `--speculate` asks for; None without it.

    Raises:
      ValueError: if there is no such model, or it has other tokens.
    """
    if speculate is None:
        return None
    if speculate == "lookup":
        return PromptLookup()
    try:
        checkpoint, config = open_with_dtype(speculate, dtype)
    except ValueError as error:
        raise ValueError(f"--speculate: {error}; or take lookup") from None
    if list(checkpoint.tokenizer().token_bytes) != list(tokenizer.token_bytes):
        raise ValueError(
            f"--speculate {speculate}: its tokens are not those of the model: take one "
            "with the same tokenizer, or lookup"
        )
    return DraftModel(config, load_onto_mesh(checkpoint, dtype=config.dtype))
