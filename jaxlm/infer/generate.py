"""Generation: reads the prompts into a cache, then decodes token by token.

Prompt lengths, cache lengths and decoding steps are rounded up to a few sizes, so that
a prompt of another length reuses compiled programs. A call can go on from the cache of
an earlier one, and then prefills only what is new. The engine knows token ids only;
text is left to the caller.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer.check_arguments import (
    check_numbers,
    check_room,
    check_samples,
    check_state,
    check_unknown,
    row_ids,
    row_samples,
)
from jaxlm.infer.decoding import CHUNK, DecodeState, Drawn, Programs, Rows
from jaxlm.infer.decoding import programs as programs_of
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.rules.stop_strings import stop_table
from jaxlm.model.block import Block
from jaxlm.model.checks import check_model
from jaxlm.model.kv_cache import Cache, LayerCache
from jaxlm.model.params import sizes
from jaxlm.model.trace import absent_sites
from jaxlm.ops.probing.edit import Edit, check_edits, check_hits
from jaxlm.sharding.rules import activation_spec, batch_parts
from jaxlm.types import Params

OnTokens = Callable[[Int[np.ndarray, "B n"], Bool[np.ndarray, "B n"]], Any]
SMALLEST_BUCKET = 32
# Tokens of all rows that prefill reads at once: a bound on its memory.
PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Generation:
    """What `generate` returns, on the host."""

    tokens: Int[np.ndarray, "B max_new_tokens"]
    """New tokens only, int32; 0 after the end of a row."""
    lengths: Int[np.ndarray, " B"]
    """Number of new tokens of each row, without the stop token."""
    logprobs: Float[np.ndarray, "B max_new_tokens"]
    """Log-probability of each token among the tokenizer's ids, f32, before any rule or
    temperature; 0 after the end."""
    top_tokens: Int[np.ndarray, "B max_new_tokens n"]
    """The `top_logprobs` most likely tokens in the place of each, the first first."""
    top_logprobs: Float[np.ndarray, "B max_new_tokens n"]
    """Their log-probabilities, as `logprobs`."""
    prefill_s: float
    """Seconds for the prompts, without compiling."""
    decode_s: float
    """Seconds for decoding, without compiling."""
    compile_s: float
    """Seconds of compiling; 0 if the programs were compiled before."""
    prefill_tokens: Int[np.ndarray, " B"]
    """Tokens of each prompt that were prefilled: all that `resume` did not hold."""
    state: GenerationState | None
    """What a next call can go on from; None unless `return_state`."""

    @property
    def rows(self) -> list[Int[np.ndarray, " _"]]:
        """The new tokens of each row, without padding."""
        pairs = zip(self.tokens, self.lengths, strict=True)
        return [row[:length] for row, length in pairs]


def bucket(length: int, largest: int) -> int:
    """`length` rounded up to a power of two from `SMALLEST_BUCKET` to `largest`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, largest)


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]]
    | Sequence[Integer[np.ndarray, " _"]]
    | Integer[np.ndarray | Array, "B _"],
    sample: SampleConfig | Sequence[SampleConfig] | None = None,
    key: Key[Array, ""] | None = None,
    *,
    num_tokens: int | None = None,
    token_bytes: Sequence[bytes] | None = None,
    top_logprobs: int = 0,
    on_tokens: OnTokens | None = None,
    resume: GenerationState | None = None,
    return_state: bool = False,
    edits: Sequence[Edit] = (),
    block: type[Block] = Block,
    **unknown: Any,
) -> Generation:
    """Continues each prompt.

    A row's result depends on its prompt, its config, its index in the batch and the
    key, not on the other rows or their lengths.

    With `resume`, each row keeps the longest prefix that its prompt shares with the
    tokens of that row in the state, and the rest is prefilled. The result is that of a
    call without it, up to the rounding of sums in another order.

    Args:
      params: stacked over layers, as `init` and `load` return them.
      prompts: rows of token ids, at least one each; lengths may differ.
      sample: how to sample, and when to stop: `stop_ids` are usually the tokenizer's.
        One for all rows, or one for each. None takes the defaults, which stop at no
        token.
      key: a typed PRNG key; None takes that of seed 0, which gives the same texts each
        time.
      num_tokens: only ids below this are sampled: those that the tokenizer has. None
        takes `config.vocab_size`.
      token_bytes: `tokenizer.token_bytes`, which stop strings and DRY need. The tokens
        of a stop string are among the result's, since it may end inside a token;
        `StopText` cuts it off the text.
      top_logprobs: how many of the most likely tokens to report at each token.
      on_tokens: called with each chunk of new tokens and a mask of those that belong to
        the text; returning True ends the generation.
      resume: the state of an earlier call with as many prompts and the same model. Its
        memory is used for this call, so it cannot be used again.
      return_state: keep the cache, as `state` of the result.
      edits: changes of sites, in the prompts and in new tokens; position p is token p
        of a row, its prompt included. What `resume` kept is not computed again. Logits
        cannot be edited.
      block: what computes a layer; see `Block`.

    Raises:
      TypeError: for an argument that does not exist.
      ValueError: for arguments of another type, an empty prompt, an id outside the
        vocabulary, a prompt that is too long for the context with max_new_tokens,
        logits that are not finite, a state that was used or belongs to another model or
        number of prompts, or an edit that cannot be or has changed nothing.
    """
    check_unknown(unknown)
    check_model(config, params, block)
    key = jax.random.key(0) if key is None else key
    num_tokens = config.vocab_size if num_tokens is None else num_tokens
    check_numbers(config, key, num_tokens, top_logprobs)
    rows = row_ids(prompts, num_tokens)
    samples = row_samples(sample, len(rows))
    check_samples(config, samples, num_tokens, token_bytes)
    check_room(config, rows, samples)
    check_edits(edits, sizes(config), absent_sites(config) | {"logits"})

    num_rows = len(rows)
    padding = -num_rows % batch_parts()
    rows, samples = rows + rows[:1] * padding, samples + samples[:1] * padding
    needed = max(len(r) + s.max_new_tokens for r, s in zip(rows, samples, strict=True))
    max_length = bucket(needed, config.context_length)
    if resume is not None:
        check_state(resume, config, params, block, len(rows))
        max_length = max(max_length, resume.cache.max_length)
    num_top = bucket(top_logprobs, config.vocab_size) if top_logprobs else 0
    programs = programs_of(config, max_length, num_top, block)

    clock = _Clock(programs)
    lengths = np.array([len(row) for row in rows], np.int32)
    edits = jax.tree.map(jnp.asarray, edits)
    layers, logits, kept, hits = _prefill(
        *(config, programs, params, rows, lengths, max_length, resume, edits)
    )
    jax.block_until_ready(logits)
    prefill_s = clock.lap()

    split = programs.split(params) if resume is None else resume.split_params
    settings = row_settings(samples, config.vocab_size, token_bytes or ())
    stops = [s.stop_strings for s in samples]
    table = stop_table(stops, token_bytes or (), config.vocab_size)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(rows)))
    history, is_done = _history(rows, max_length), np.zeros(len(rows), bool)
    begun = Rows(history, table.start_states, is_done)
    filled, begun, keys, settings = programs.place((lengths, begun, keys, settings))
    state = DecodeState(Cache(layers, filled), logits, begun, hits)
    shared = jnp.asarray(table.next_states), jnp.int32(num_tokens)
    # Not part of the time for decoding.
    jax.block_until_ready((split, state, keys, settings, shared))
    clock.lap()
    most = max(sample.max_new_tokens for sample in samples)
    state, drawn = _decode(
        lambda state: programs.decode(split, state, keys, settings, *shared, edits),
        *(state, most, num_rows, on_tokens),
    )
    decode_s = clock.lap()
    check_hits(edits, state.hits)

    pairs = zip(rows, drawn.tokens, strict=True)
    held = [np.concatenate(pair) for pair in pairs]
    text = _texts(drawn, num_rows, most, top_logprobs)
    return Generation(
        tokens=text.tokens,
        lengths=text.inside.sum(axis=1).astype(np.int32),
        logprobs=text.logprobs,
        top_tokens=text.top_tokens,
        top_logprobs=text.top_logprobs,
        prefill_s=prefill_s,
        decode_s=decode_s,
        compile_s=clock.compile_s,
        prefill_tokens=(lengths - kept)[:num_rows],
        state=GenerationState(config, params, block, split, held, state.cache)
        if return_state
        else None,
    )


def _prefill(
    config: ModelConfig,
    programs: Programs,
    params: Params,
    rows: list[Int[np.ndarray, " _"]],
    lengths: Int[np.ndarray, " B"],
    max_length: int,
    resume: GenerationState | None,
    edits: Sequence[Edit],
) -> tuple[
    tuple[LayerCache, ...], Float[Array, "B V"], Int[np.ndarray, " B"], tuple[Any, ...]
]:
    """Reads what the cache lacks, in chunks of a few sizes.

    Returns the layers of the cache, the logits of each row's next token, how many
    tokens of each row the cache held before, and how often each edit has fired.
    """
    kept = np.zeros_like(lengths)
    if resume is not None:
        kept = np.array(resume.shared_lengths(rows), np.int32)
    widths = _widths(int((lengths - kept).max()), len(rows), max_length)
    # The cache must have room for the padding too.
    kept = np.minimum(kept, max_length - sum(widths))
    layers: Any = None
    logits: Any = None
    if resume is not None and kept.any():
        layers = resume.cache.layers
        shape, sharding = (len(rows), config.vocab_size), activation_spec("B_")
        logits = jnp.zeros(shape, jnp.float32, out_sharding=sharding)
        if resume.cache.max_length < max_length:
            layers = programs.grow(layers)
    if resume is not None and layers is not resume.cache.layers:
        resume.delete()
    start, hits = kept, (0,) * len(edits)
    for width in widths:
        tokens = np.zeros((len(rows), width), np.int32)
        for new, row, first in zip(tokens, rows, start, strict=True):
            part = row[first : first + width]
            new[: len(part)] = part
        if layers is None:
            layers, logits, fired = programs.begin(params, tokens, lengths, edits)
        else:
            layers, logits, fired = programs.extend(
                *(params, tokens, start, lengths, layers, logits, edits)
            )
        hits = tuple(a + b for a, b in zip(hits, fired, strict=True))
        start = start + np.int32(width)
    return layers, logits, kept, hits


def _widths(length: int, num_rows: int, max_length: int) -> list[int]:
    """Splits a prompt into chunks: whole ones, and a power of two for the rest."""
    whole = SMALLEST_BUCKET
    while 2 * whole * num_rows <= PREFILL_TOKENS:
        whole *= 2
    widths = [whole] * ((length - 1) // whole)
    done = sum(widths)
    return [*widths, bucket(length - done, max_length - done)]


def _history(rows: list[Int[np.ndarray, " _"]], max_length: int) -> History:
    tokens = np.zeros((len(rows), max_length), np.int32)
    for new, row in zip(tokens, rows, strict=True):
        new[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    return History(tokens, lengths, lengths.copy())


def _decode(
    step: Callable[[DecodeState], tuple[DecodeState, Drawn]],
    state: DecodeState,
    max_new_tokens: int,
    num_rows: int,
    on_tokens: OnTokens | None,
) -> tuple[DecodeState, Drawn]:
    """Calls `step` for one chunk after another, until the texts end.

    Returns what was drawn, in whole chunks and with the rows that pad the batch.
    """
    chunks = []
    for first in range(0, max_new_tokens, CHUNK):
        state, drawn = step(state)
        drawn = jax.tree.map(np.asarray, drawn)
        if np.isnan(drawn.logprobs).any():
            raise ValueError(
                "the model's logits are not finite: its parameters hold NaN or "
                "infinities, or the compute dtype overflows (compute in float32)"
            )
        chunks.append(drawn)
        # The last chunk may go beyond `max_new_tokens`.
        text = np.s_[:num_rows, : max_new_tokens - first]
        new, inside = drawn.tokens[text], drawn.inside[text]
        if on_tokens is not None and on_tokens(new, inside) is True:
            break
        if np.asarray(state.rows.is_done)[:num_rows].all():
            break
    return state, jax.tree.map(lambda *x: np.concatenate(x, axis=1), *chunks)


def _texts(drawn: Drawn, num_rows: int, length: int, num_top: int) -> Drawn:
    """Cuts what was drawn to rows of `length` tokens, with 0 after their ends."""
    inside = drawn.inside[:num_rows, :length]

    def text(x: np.ndarray) -> np.ndarray:
        x = x[:num_rows, :length]
        x = np.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), x, 0)
        x = x.astype(np.int32 if x.dtype.kind == "i" else np.float32)
        missing = (length - x.shape[1], *[0] * (x.ndim - 2))
        return np.pad(x, [(0, 0), *((0, n) for n in missing)])

    return Drawn(
        text(drawn.tokens),
        inside,
        text(drawn.logprobs),
        text(drawn.top_tokens[..., :num_top]),
        text(drawn.top_logprobs[..., :num_top]),
    )


class _Clock:
    """Measures the stages of a generation, without compiling."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._compiled_before = programs.compile_s
        self._lap = time.perf_counter(), self._compiled_before

    @property
    def compile_s(self) -> float:
        return self._programs.compile_s - self._compiled_before

    def lap(self) -> float:
        """Seconds since the last lap."""
        now, compiled = time.perf_counter(), self._programs.compile_s
        seconds = (now - self._lap[0]) - (compiled - self._lap[1])
        self._lap = now, compiled
        return seconds
