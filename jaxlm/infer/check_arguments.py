"""Checks what `generate` is given, before anything is compiled."""

import math
from collections.abc import Mapping, Sequence, Sized
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxlm.config import CacheKind, ModelConfig, SampleConfig
from jaxlm.fields import nearest
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.rules.automata import ENDS, Automaton
from jaxlm.infer.speculative.proposals import DraftModel, Proposer
from jaxlm.model.block import Block
from jaxlm.model.checks import check_key, check_model
from jaxlm.model.initialization import init_cache
from jaxlm.model.positions import max_fixed_rotation_length
from jaxlm.ops.ids import check_ids
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.device_memory import available_memory, gib
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


def row_samples(sample: Any, num_rows: int) -> list[SampleConfig]:
    """Returns the config of each row.

    Raises:
      ValueError: if `sample` is neither None, nor a config, nor one for each row.
    """
    if sample is None or isinstance(sample, SampleConfig):
        return [sample or SampleConfig()] * num_rows
    if not isinstance(sample, Sequence) or not all(
        isinstance(s, SampleConfig) for s in sample
    ):
        raise ValueError(
            f"sample is a {type(sample).__name__}, not a SampleConfig: the order is "
            "(config, params, prompts, sample, key)"
        )
    if len(sample) != num_rows:
        raise ValueError(
            f"sample has {len(sample)} configs for {num_rows} prompts: give one for "
            "each, or one for all"
        )
    return list(sample)


def row_grammars(
    grammars: Sequence[Automaton | None] | None, num_rows: int
) -> list[Automaton | None]:
    """Returns the grammar of each row, or None for it.

    Raises:
      ValueError: if there is not one entry for each.
    """
    if grammars is None:
        return [None] * num_rows
    if len(grammars) != num_rows:
        raise ValueError(
            f"grammars has {len(grammars)} entries for {num_rows} prompts: give one "
            "for each, or None"
        )
    return list(grammars)


def check_unknown(unknown: Mapping[str, Any]) -> None:
    """Raises a TypeError for an argument that `generate` does not have."""
    for name, value in unknown.items():
        fields = list(SampleConfig.__dataclass_fields__)
        if name in fields:
            raise TypeError(
                f"generate has no {name}: give sample=SampleConfig({name}={value!r})"
            )
        raise TypeError(f"generate has no {name}{nearest(name, fields)}")


def check_room(name: str, tokens: Sized, max_new_tokens: int, max_length: int) -> None:
    """Raises a ValueError for a prompt that leaves no room for its new tokens.

    Args:
      name: of the prompt.
      max_length: tokens that prompt and new tokens may be together.
    """
    room = max_length - len(tokens)
    if max_new_tokens > room:
        lower = f" or lower max_new_tokens to {room}" if room > 0 else ""
        ones = "one" if max_new_tokens == 1 else "ones"
        raise ValueError(
            f"{name} has {len(tokens)} tokens, with {max_new_tokens} new {ones} "
            f"{len(tokens) + max_new_tokens}: more than the context of {max_length}; "
            f"shorten the prompt{lower}"
        )


def check_cache(
    config: ModelConfig,
    params: Params,
    num_rows: int,
    max_length: int,
    kind: CacheKind,
    spare: int = 0,
) -> int:
    """Returns the bytes of a cache on a device of the current mesh.

    Args:
      spare: as for `init_cache`.

    Raises:
      ValueError: for a kind that does not exist, and a cache that does not fit beside
        the parameters.
    """
    kinds = get_args(CacheKind)
    if kind not in kinds:
        raise ValueError(f"cache is {kind!r}: choose one of {', '.join(kinds)}")

    def on_device(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    size = (config, num_rows, max_length)
    cache = jax.eval_shape(lambda: init_cache(*size, kind=kind, spare=spare))
    needed = sum(map(on_device, jax.tree.leaves(cache.layers)))
    present = sum(map(on_device, jax.tree.leaves(params)))
    available = available_memory()
    if needed + present > available:
        raise ValueError(
            f"the {kind} cache of {num_rows} rows of {max_length:,} tokens needs "
            f"{gib(needed)} on a device, which has {gib(available)} for it and for "
            f"{gib(present)} of parameters: decode fewer rows at once or shorter "
            "texts, or take the cache ring_int8 or ring_int4"
        )
    return needed


def check_speculation(
    speculate: Any, config: ModelConfig, max_length: int, taps: Sequence[Tap]
) -> None:
    """Raises a ValueError for a way to speculate that a model cannot take.

    Args:
      max_length: tokens for which the cache has room.
    """
    if not isinstance(speculate, Proposer):
        raise ValueError(
            f"speculate is a {type(speculate).__name__}: give PromptLookup() or "
            "DraftModel(config, params)"
        )
    if taps:
        raise ValueError(
            "taps read one token after the other: leave out taps or speculate"
        )
    scaling = config.rope_scaling
    if scaling is not None and max_fixed_rotation_length(config) is not None:
        raise ValueError(
            f"speculate: rope_scaling {scaling.kind!r} rotates by the "
            "length of the text, which guesses would change: leave out speculate"
        )
    if isinstance(speculate, DraftModel):
        check_model(speculate.config, speculate.params, Block)
        context = speculate.config.context_length
        if context < max_length:
            raise ValueError(
                f"speculate: the draft model has a context of {context}, and the cache "
                f"has room for {max_length}: take another draft model or shorter texts"
            )


def check_grammar(grammar: Any, vocab_size: int, max_new_tokens: int) -> None:
    """Raises a ValueError for what is no automaton over the vocabulary.

    Also if the shortest text that it allows has more than `max_new_tokens`.
    """
    if not isinstance(grammar, Automaton):
        raise ValueError(
            f"grammar is a {type(grammar).__name__}: make it by token_grammar"
        )
    table = grammar.transitions
    shape, dtype = np.shape(table), getattr(table, "dtype", None)
    if len(shape) != 2 or shape[1] != vocab_size or dtype != np.int16:
        raise ValueError(
            f"grammar has shape {shape} and dtype {dtype}: give a table [states, "
            f"{vocab_size}] of int16"
        )
    if not shape[0] or table.min() < ENDS or table.max() >= shape[0]:
        raise ValueError(
            f"grammar leads to states outside {ENDS} to {shape[0] - 1}: see automata.py"
        )
    if grammar.needs[0] > max_new_tokens:
        raise ValueError(
            f"the shortest text that the grammar allows has {grammar.needs[0]} tokens, "
            f"more than max_new_tokens {max_new_tokens}: raise it"
        )


def row_keys(key: Any, num_rows: int) -> Key[Array, " B"]:
    """Returns the key of each row: those given, or made from one key or a seed.

    Raises:
      ValueError: for anything else.
    """
    if key is None or isinstance(key, int):
        if key is not None and not 0 <= key < 2**32:
            raise ValueError(f"key is {key}: a seed must be in [0, 2**32)")
        key = jax.random.key(key or 0)
    check_key(key, (), (num_rows,))
    if key.shape:
        return key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_rows))


def check_count(name: str, value: Any, least: int, vocab_size: int) -> None:
    """Raises a ValueError for what is no integer from `least` to `vocab_size`."""
    is_integer = isinstance(value, int | np.integer)
    if not is_integer or not least <= value <= vocab_size:
        raise ValueError(
            f"{name} is {value!r}: it must be from {least} to model.vocab_size "
            f"{vocab_size}"
        )


def check_samples(
    config: ModelConfig,
    samples: list[SampleConfig],
    num_tokens: int,
    token_bytes: Sequence[bytes] | None,
) -> None:
    """Raises a ValueError for configs that do not fit the model and tokenizer."""
    for sample in dict.fromkeys(samples):
        for name in ("stop_ids", "bias_ids", "forbidden_ids"):
            for i in getattr(sample, name):
                if not 0 <= i < config.vocab_size:
                    raise ValueError(f"sample.{name}: {i} is not in the vocabulary")
        if len({i for i in sample.forbidden_ids if i < num_tokens}) == num_tokens:
            raise ValueError("sample.forbidden_ids leaves no token: forbid fewer")
        if token_bytes is None and (sample.stop_strings or sample.dry_multiplier):
            name = "stop_strings" if sample.stop_strings else "dry_multiplier"
            raise ValueError(
                f"sample.{name} needs the text of the tokens: give "
                "token_bytes=tokenizer.token_bytes"
            )
    if token_bytes is not None and len(token_bytes) > config.vocab_size:
        raise ValueError(
            f"token_bytes has {len(token_bytes)} texts for the {config.vocab_size} ids "
            "of the model: it is of another tokenizer"
        )


def check_state(
    state: Any,
    config: ModelConfig,
    params: Params,
    block: type[Block],
    cache: CacheKind,
    num_rows: int,
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
    if cache != state.cache_kind:
        raise ValueError(
            f"resume: this state has the cache {state.cache_kind}, not {cache}: give "
            "the same"
        )
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
