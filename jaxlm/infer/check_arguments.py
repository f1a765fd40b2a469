"""Checks what `generate` is given, before anything is compiled."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer.generation_state import GenerationState
from jaxlm.model.block import Block
from jaxlm.model.checks import check_ids, check_key
from jaxlm.types import Params


def row_ids(prompts: Any, num_tokens: int) -> list[Int[np.ndarray, " _"]]:
    """Returns the ids of each prompt.

    Raises:
      ValueError: if `prompts` is not at least one row of ids below `num_tokens`.
    """
    if isinstance(prompts, str) or hasattr(prompts, "keys"):
        raise ValueError(
            f"prompts is a {type(prompts).__name__}, not a list of rows of token ids: "
            "encode text first, [tokenizer.encode(text)]"
        )
    try:
        prompts = list(prompts)
    except TypeError:
        raise ValueError(
            f"prompts is {prompts!r}: give a list of rows of token ids"
        ) from None
    if not prompts:
        raise ValueError("no prompts: give at least one")
    return [_row(i, prompt, num_tokens) for i, prompt in enumerate(prompts)]


def _row(i: int, prompt: Any, num_tokens: int) -> Int[np.ndarray, " _"]:
    if isinstance(prompt, str):
        raise ValueError(
            f"prompt {i} is text: encode it first, [tokenizer.encode(text)]"
        )
    if np.ndim(prompt) == 0:
        raise ValueError(
            f"prompts[{i}] is {prompt}, not a row of token ids: a single prompt goes "
            "into a list too, [[1, 2, 3]]"
        )
    if not len(prompt):
        raise ValueError(f"prompt {i} is empty: give at least one token")
    row = np.asarray(prompt)
    if row.ndim > 1:
        raise ValueError(f"prompt {i} has shape {row.shape}: give a row of token ids")
    if row.dtype.kind not in "iu":
        raise ValueError(f"prompt {i} is of {row.dtype}: token ids are integers")
    check_ids(f"prompt {i}", row, num_tokens)
    return row.astype(np.int32)


def check_room(
    config: ModelConfig, rows: list[Int[np.ndarray, " _"]], max_new_tokens: int
) -> None:
    """Raises a ValueError for a row that leaves no room for as many new tokens."""
    context = config.context_length
    for i, row in enumerate(rows):
        total, room = len(row) + max_new_tokens, context - len(row)
        if total > context:
            lower = f" or lower max_new_tokens to {room}" if room > 0 else ""
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, with {max_new_tokens} new ones "
                f"{total}: more than the model's context of {context}; shorten the "
                f"prompt{lower}"
            )


def check_sampling(config: ModelConfig, sample: Any, key: Any, num_tokens: Any) -> None:
    """Raises a ValueError for wrong arguments of `generate` about sampling."""
    if not isinstance(sample, SampleConfig):
        raise ValueError(
            f"sample is a {type(sample).__name__}, not a SampleConfig: the order is "
            "(config, params, prompts, sample, key)"
        )
    for stop in sample.stop_ids:
        if not 0 <= stop < config.vocab_size:
            raise ValueError(f"sample.stop_ids: {stop} is not in the vocabulary")
    check_key(key)
    is_integer = isinstance(num_tokens, int | np.integer)
    if not is_integer or not 0 < num_tokens <= config.vocab_size:
        raise ValueError(
            f"num_tokens is {num_tokens!r}: it must be from 1 to model.vocab_size "
            f"{config.vocab_size}"
        )


def check_state(
    state: Any, config: ModelConfig, params: Params, block: type[Block], num_rows: int
) -> None:
    """Raises a ValueError if a call with these arguments cannot go on from `state`."""
    if not isinstance(state, GenerationState):
        raise ValueError(
            f"resume is a {type(state).__name__}: give the `state` of an earlier result"
        )
    if any(x.is_deleted() for x in jax.tree.leaves(state.cache.layers)):
        raise ValueError(
            "resume: this state was used before, and a state can be used once; take "
            "the one that the later call returned"
        )
    leaves = zip(*map(jax.tree.leaves, (params, state.params)), strict=False)
    same_model = (config, block) == (state.config, state.block)
    if not same_model or any(given is not own for given, own in leaves):
        raise ValueError(
            "resume: this state belongs to another config, other params or another "
            "block: give the same, or resume=None"
        )
    if num_rows != len(state.tokens):
        raise ValueError(
            f"resume: this state has {len(state.tokens)} rows, and there are "
            f"{num_rows} prompts: give as many"
        )
