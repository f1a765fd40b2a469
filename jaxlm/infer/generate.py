"""Generation: prefill the prompts, then decode in a `lax.scan` over a cache.

Prompt lengths, cache lengths and decoding steps are rounded up to a few sizes, so that
a prompt of another length reuses compiled programs. A call can go on from the cache of
an earlier one, and then prefills only what is new. The engine knows token ids only;
text is left to the caller.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer.check_arguments import check_room, check_sampling, check_state, row_ids
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.sampling import NEVER, sample_tokens
from jaxlm.model.block import Block
from jaxlm.model.checks import check_model
from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import Cache, LayerCache, unstack
from jaxlm.model.params import cast_matrices
from jaxlm.model.transformer import forward, unembed
from jaxlm.ops.linear import compute_dtype
from jaxlm.sharding.rules import batch_parts, reshard
from jaxlm.types import Params

# Tokens decoded by one call of the compiled program. Between calls a stream prints its
# text, and generation can stop.
CHUNK = 16
OnTokens = Callable[[Int[np.ndarray, "B n"], Bool[np.ndarray, "B n"]], Any]
SMALLEST_BUCKET = 32


@dataclass(frozen=True)
class Generation:
    """What `generate` returns, on the host."""

    tokens: Int[np.ndarray, "B max_new_tokens"]
    """New tokens only, int32; 0 after the end of a row."""
    lengths: Int[np.ndarray, " B"]
    """Number of new tokens of each row, without the stop token."""
    logprobs: Float[np.ndarray, "B max_new_tokens"]
    """Log-probability of each token among the tokenizer's ids, f32; 0 after the end."""
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that the decoding scan carries from token to token."""

    # `Any`: see `jaxlm/types.py` on leaves.
    cache: Cache
    logits: Any
    """[B, V] f32: logits of the next token."""
    count: Any
    """[] int32: new tokens so far."""
    done: Any
    """[B] bool: rows that have sampled a stop token."""


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
    sample: SampleConfig | None = None,
    key: Key[Array, ""] | None = None,
    *,
    num_tokens: int | None = None,
    on_tokens: OnTokens | None = None,
    resume: GenerationState | None = None,
    return_state: bool = False,
    block: type[Block] = Block,
) -> Generation:
    """Continues each prompt.

    A row's result depends on its prompt, its index in the batch and the key, not on the
    other rows or their lengths.

    With `resume`, each row keeps the longest prefix that its prompt shares with the
    tokens of that row in the state, and the rest is prefilled. The result is that of a
    call without it, up to the rounding of sums in another order.

    Args:
      params: stacked over layers, as `init` and `load` return them.
      prompts: rows of token ids, at least one each; lengths may differ.
      sample: how to sample, and when to stop: `stop_ids` are usually the tokenizer's.
        None takes the defaults, which stop at no token.
      key: a typed PRNG key; None takes that of seed 0, which gives the same texts each
        time.
      num_tokens: only ids below this are sampled: those that the tokenizer has. None
        takes `config.vocab_size`.
      on_tokens: called with each chunk of new tokens and a mask of those that belong to
        the text; returning True ends the generation.
      resume: the state of an earlier call with as many prompts and the same model. Its
        memory is used for this call, so it cannot be used again.
      return_state: keep the cache, as `state` of the result.
      block: what computes a layer; see `Block`.

    Raises:
      ValueError: for arguments of another type, an empty prompt, an id outside the
        vocabulary, a prompt that is too long for the context with max_new_tokens,
        logits that are not finite, or a state that was used or belongs to another model
        or number of prompts.
    """
    check_model(config, params, block)
    sample = SampleConfig() if sample is None else sample
    key = jax.random.key(0) if key is None else key
    num_tokens = config.vocab_size if num_tokens is None else num_tokens
    check_sampling(config, sample, key, num_tokens)
    rows = row_ids(prompts, num_tokens)
    check_room(config, rows, sample.max_new_tokens)
    num_rows = len(rows)
    rows += rows[:1] * (-num_rows % batch_parts())
    lengths = np.array([len(row) for row in rows], np.int32)
    needed = int(lengths.max()) + sample.max_new_tokens
    max_length = bucket(needed, config.context_length)
    if resume is not None:
        check_state(resume, config, params, block, len(rows))
        max_length = max(max_length, resume.cache.max_length)
    tokens, kept = _tokens_to_prefill(rows, resume, max_length)
    # `max_new_tokens` does not change the programs.
    same = replace(sample, max_new_tokens=1)
    programs = _programs(config, max_length, same, num_tokens, block)

    clock = _Clock(programs)
    layers = None if resume is None else resume.cache.layers
    if resume is None or resume.cache.max_length < max_length:
        layers = programs.allocate(lengths, layers)
        if resume is not None:
            resume.delete()
    state = programs.prefill(params, tokens, kept, lengths, layers)
    jax.block_until_ready(state.logits)
    prefill_s = clock.lap()

    split = programs.split(params) if resume is None else resume.split_params
    jax.block_until_ready(split)  # not part of the time for decoding
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(rows)))
    clock.lap()
    state, drawn, inside, logprobs = _decode(
        lambda state: programs.decode(split, state, keys),
        state,
        sample.max_new_tokens,
        num_rows,
        on_tokens,
    )
    decode_s = clock.lap()

    held = [np.concatenate([row, new]) for row, new in zip(rows, drawn, strict=True)]
    count = min(drawn.shape[1], sample.max_new_tokens)
    text = np.s_[:num_rows, :count]
    new, inside, logprobs = drawn[text], inside[text], logprobs[text]
    missing = ((0, 0), (0, sample.max_new_tokens - count))
    return Generation(
        tokens=np.pad(np.where(inside, new, 0), missing).astype(np.int32),
        lengths=inside.sum(axis=1).astype(np.int32),
        logprobs=np.pad(np.where(inside, logprobs, 0), missing).astype(np.float32),
        prefill_s=prefill_s,
        decode_s=decode_s,
        compile_s=clock.compile_s,
        prefill_tokens=(lengths - kept)[:num_rows],
        state=GenerationState(config, params, block, split, held, state.cache)
        if return_state
        else None,
    )


def _tokens_to_prefill(
    rows: list[Int[np.ndarray, " _"]], resume: GenerationState | None, max_length: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Returns the tokens that the cache lacks, and where each row starts in it."""
    kept = [0] * len(rows) if resume is None else resume.shared_lengths(rows)
    new = max(len(row) - n for row, n in zip(rows, kept, strict=True))
    width = bucket(new, max_length)
    # The cache must have room for the padding too.
    kept = [min(n, max_length - width) for n in kept]
    tokens = np.zeros((len(rows), width), np.int32)
    for new, row, n in zip(tokens, rows, kept, strict=True):
        new[: len(row) - n] = row[n:]
    return tokens, np.array(kept, np.int32)


def _decode(
    step: Callable[[DecodeState], tuple[DecodeState, Array, Array, Array]],
    state: DecodeState,
    max_new_tokens: int,
    num_rows: int,
    on_tokens: OnTokens | None,
) -> tuple[
    DecodeState,
    Int[np.ndarray, "B n"],
    Bool[np.ndarray, "B n"],
    Float[np.ndarray, "B n"],
]:
    """Calls `step` for one chunk after another, until the texts end.

    Returns the new tokens, a mask of those before the end of each text, and their
    log-probabilities: in whole chunks, and with the rows that pad the batch.
    """
    chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for first in range(0, max_new_tokens, CHUNK):
        state, *out = step(state)
        new, inside, logprobs = map(np.asarray, out)
        if np.isnan(logprobs).any():
            raise ValueError(
                "the model's logits are not finite: its parameters hold NaN or "
                "infinities, or the compute dtype overflows (compute in float32)"
            )
        chunks.append((new, inside, logprobs))
        # The last chunk may go beyond `max_new_tokens`.
        text = np.s_[:num_rows, : max_new_tokens - first]
        stopped = on_tokens is not None and on_tokens(new[text], inside[text]) is True
        if stopped or not inside[text][:, -1].any():
            break
    new, inside, logprobs = (
        np.concatenate(c, axis=1) for c in zip(*chunks, strict=True)
    )
    return state, new, inside, logprobs


class _Program:
    """A jitted function that measures its compile time."""

    def __init__(self, function: Callable[..., Any], donate: tuple[int, ...] = ()):
        self._jitted = jax.jit(function, donate_argnums=donate)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_s = 0.0

    def __call__(self, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        types = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = (jax.sharding.get_mesh(), structure, types)
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._jitted.lower(*arguments).compile()
            self.compile_s += time.perf_counter() - start
        return self._compiled[key](*arguments)


class _Programs(NamedTuple):
    allocate: _Program
    prefill: _Program
    split: _Program
    decode: _Program

    @property
    def compile_s(self) -> float:
        return sum(program.compile_s for program in self)


class _Clock:
    """Measures the stages of a generation, without compiling."""

    def __init__(self, programs: _Programs):
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


@lru_cache(maxsize=32)
def _programs(
    config: ModelConfig,
    max_length: int,
    sample: SampleConfig,
    num_tokens: int,
    block: type[Block],
) -> _Programs:
    """The compiled functions of a model and sampling config, for every batch shape."""
    dtype = compute_dtype(config.dtype)
    forward_block = partial(forward, config, block=block)

    def allocate(lengths, old) -> tuple[LayerCache, ...]:
        """An empty cache, or `old` with more room."""
        stacked = init_cache(config, lengths.shape[0], max_length).layers
        layers = unstack(stacked, config.num_layers)
        if old is None:
            return layers
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice(x, y, (0, 0, 0, 0)), layers, old
        )

    def prefill(params, tokens, kept, lengths, layers) -> DecodeState:
        """Adds each row's tokens after the first `kept`, up to `lengths` in all."""
        tokens = reshard(tokens, "BT")
        kept, lengths = reshard(kept, "B"), reshard(lengths, "B")
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        cache = Cache(layers=stacked, lengths=kept)
        # Padding does not make a row longer: some rotations depend on its length.
        index = kept[:, None] + jnp.arange(tokens.shape[1])
        positions = jnp.minimum(index, lengths[:, None] - 1)
        out = forward_block(
            params, tokens, positions=positions, cache=cache, head=False
        )
        assert out.cache is not None
        # Only the last token of each prompt needs logits.
        is_last = index == lengths[:, None] - 1
        last = jnp.sum(
            jnp.where(is_last[..., None], out.hidden_states, 0), axis=1, keepdims=True
        )
        logits = unembed(config, params, last)[:, 0]
        layers = unstack(out.cache.layers, config.num_layers)
        return DecodeState(
            cache=Cache(layers=layers, lengths=lengths),
            logits=logits,
            count=jnp.zeros((), jnp.int32),
            done=jnp.zeros_like(lengths, dtype=bool),
        )

    def decode(params, state: DecodeState, keys):
        keys = reshard(keys, "B")

        def one(state: DecodeState, _):
            keys_now = jax.vmap(lambda k: jax.random.fold_in(k, state.count))(keys)
            exists = jnp.arange(config.vocab_size) < num_tokens
            logits = jnp.where(exists, reshard(state.logits, "B_"), NEVER)
            token, logprob = sample_tokens(
                logits,
                keys_now,
                temperature=sample.temperature,
                top_k=sample.top_k,
                top_p=sample.top_p,
            )
            stop = jnp.zeros_like(state.done)
            for stop_id in sample.stop_ids:
                stop |= token == stop_id
            inside = ~(state.done | stop)
            out = forward_block(params, token[:, None], cache=state.cache)
            assert out.cache is not None and out.logits is not None
            new = DecodeState(out.cache, out.logits[:, 0], state.count + 1, ~inside)
            return new, (token, inside, logprob)

        state, out = jax.lax.scan(one, state, length=CHUNK)
        return state, *(x.swapaxes(0, 1) for x in out)

    def split(params):
        # Each einsum would round them, in every step anew.
        params = cast_matrices(params, dtype)
        return {**params, "layers": unstack(params["layers"], config.num_layers)}

    return _Programs(
        _Program(allocate),
        _Program(prefill, donate=(4,)),
        _Program(split),
        _Program(decode, donate=(1,)),
    )
