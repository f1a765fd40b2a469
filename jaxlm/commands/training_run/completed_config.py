"""The config of a training run, completed by what its text and its steps imply."""

import dataclasses

from jaxlm.config import Config, TrainConfig
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import CharTokenizer


def completed(config: Config, tokenizer: Tokenizer) -> Config:
    """Sets the vocabulary size, the warm-up and the prompt of the samples.

    Raises:
      ValueError: if the vocabulary is too small for the tokenizer.
    """
    return with_prompt(
        with_vocabulary(with_fitting_warmup(config), tokenizer.vocab_size), tokenizer
    )


def with_fitting_warmup(config: Config) -> Config:
    """Shortens a warm-up of more than half of the run to a tenth of it."""
    steps, optimizer = config.train.steps, config.optimizer
    if 2 * optimizer.warmup_steps <= steps:
        return config
    optimizer = dataclasses.replace(optimizer, warmup_steps=max(steps // 10, 1))
    return dataclasses.replace(config, optimizer=optimizer)


def with_vocabulary(config: Config, size: int) -> Config:
    """Sets `model.vocab_size` if it is 0, else checks that it holds all tokens."""
    model = config.model
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=size)
    elif model.vocab_size < size:
        raise ValueError(
            f"model.vocab_size is {model.vocab_size}, but the tokenizer has {size} "
            "tokens: raise it, or leave it at 0"
        )
    return dataclasses.replace(config, model=model)


def with_prompt(config: Config, tokenizer: Tokenizer) -> Config:
    """Replaces the default prompt, a line end, for characters of a text without one."""
    default, prompt = TrainConfig.sample_prompt, config.train.sample_prompt
    if prompt != default or not isinstance(tokenizer, CharTokenizer):
        return config
    if default in tokenizer.characters:
        return config
    train = dataclasses.replace(config.train, sample_prompt=tokenizer.characters[0])
    return dataclasses.replace(config, train=train)
