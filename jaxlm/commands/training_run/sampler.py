"""The samples that a training run takes of its model."""

import dataclasses
from collections.abc import Callable

import jax

from jaxlm.commands.generating.generation import with_stop_ids
from jaxlm.config import Config
from jaxlm.infer.check_arguments import check_room, check_samples
from jaxlm.infer.generate import generate
from jaxlm.infer.rules.stop_strings import until_stop
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

# Folded into the seed for the keys of samples; the parameters use the seed itself.
SAMPLE_STREAM = 1


def make_sampler(
    config: Config, tokenizer: Tokenizer
) -> Callable[[Params, int, Callable[[], bool]], str]:
    """Makes the function that generates a sample from the parameters at a step.

    It generates `train.sample_tokens` tokens, or fewer where the context ends or where
    the function that it is given returns True.

    Raises:
      ValueError: for an empty prompt, one that fills the context, and a stop id outside
        the vocabulary. `generate` would raise it too, but only in the middle of a run.
    """
    settings, model, flag = config.train, config.model, "--train.sample-prompt"
    off = "or turn samples off with --train.sample-every 0"
    try:
        prompt = tokenizer.encode_prompt(settings.sample_prompt)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}; {off}") from error
    if not len(prompt):
        raise ValueError(f"{flag} is empty: give at least one token, {off}")
    check_room(flag, prompt, 1, model.context_length)
    room = model.context_length - len(prompt)
    sample_config = dataclasses.replace(
        config.sample, max_new_tokens=min(settings.sample_tokens, room)
    )
    sample_config = with_stop_ids(sample_config, tokenizer)
    key = jax.random.fold_in(jax.random.key(settings.seed), SAMPLE_STREAM)
    check_samples(model, [sample_config], tokenizer.vocab_size, tokenizer.token_bytes)

    def sample(params: Params, step: int, is_over: Callable[[], bool]) -> str:
        result = generate(
            model,
            params,
            [prompt],
            sample_config,
            jax.random.fold_in(key, step),
            num_tokens=tokenizer.vocab_size,
            token_bytes=tokenizer.token_bytes,
            on_tokens=lambda *_: is_over(),
        )
        text = tokenizer.decode(result.rows[0])
        return until_stop(text, sample_config.stop_strings)

    return sample
