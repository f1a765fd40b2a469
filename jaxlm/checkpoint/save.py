"""Saves a model as a run folder, which `load`, sample.py and --init-from read."""

import os
from collections.abc import Callable
from pathlib import Path

from jaxlm import tree
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.run_folder import is_new
from jaxlm.checkpoint.opened import print_to_stderr
from jaxlm.config import Config, DataConfig, ModelConfig
from jaxlm.model.checks import check_config, check_params
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params, Quantized


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    report: Callable[[str], None] = print_to_stderr,
) -> None:
    """Writes a model into a new run folder, as its step 0, and waits until it is there.

    Args:
      path: a folder that does not exist, or is empty. What an interrupted call has left
        is taken for nothing.
      params: stacked over layers; parameters that a block of one's own adds are saved
        too.
      report: gets a line for what else a person should know.

    Raises:
      ValueError: if the folder holds something, the arguments do not fit together, or
        it cannot be written.
    """
    path = Path(os.path.expanduser(path))
    check_config(config)
    check_params(config, params, own_layers=True)
    for name, leaf in tree.flatten(params).items():
        if isinstance(leaf, Quantized):
            raise ValueError(
                f"{name} is quantized, which no checkpoint holds: save the parameters "
                "as they were loaded"
            )
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}: give a jaxlm tokenizer, as "
            "load_tokenizer returns it"
        )
    if not is_new(path):
        raise ValueError(f"{path} already exists: choose another name, or remove it")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{config.vocab_size}: it is of another model"
        )
    length = min(DataConfig().sequence_length, config.context_length)
    run = Config(model=config, data=DataConfig(sequence_length=length))
    with CheckpointManager(path, report=report) as checkpoints:
        checkpoints.save(
            0,
            params,
            {},
            config=run,
            tokenizer=tokenizer,
            data_fingerprint="",
        )
