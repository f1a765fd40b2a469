"""Generation: reads the prompts into a cache, then decodes token by token.

Prompt lengths, cache lengths and decoding steps are rounded up to a few sizes, so that
a prompt of another length reuses compiled programs. A call can go on from the cache of
an earlier one, and then prefills only what is new. The engine knows token ids only;
text is left to the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from jaxlm.config import CacheKind, ModelConfig, SampleConfig
from jaxlm.infer.check_arguments import (
    check_count,
    check_room,
    check_samples,
    check_state,
    check_unknown,
    row_grammars,
    row_ids,
    row_keys,
    row_samples,
)
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.generation_trace import check_generation_taps, joined
from jaxlm.infer.prefill import capacity
from jaxlm.infer.rules.automata import Automaton
from jaxlm.infer.slots.engine import Engine
from jaxlm.infer.slots.slot_request import NewTokens, Request
from jaxlm.infer.speculative.proposals import Proposer
from jaxlm.model.block import Block
from jaxlm.model.checks import check_model
from jaxlm.model.params import sizes
from jaxlm.model.trace import absent_sites
from jaxlm.ops.probing.edit import Edit, check_edits, check_hits
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.rules import batch_parts
from jaxlm.terminal.progress import progress_bar
from jaxlm.types import Params, Trace

OnTokens = Callable[[Int[np.ndarray, "B n"], Bool[np.ndarray, "B n"]], Any]
# Tokens that each row grows by between two calls of `on_tokens`, at most.
CHUNK = 16


@dataclass(frozen=True)
class Generation:
    """What `generate` returns, on the host."""

    tokens: Int[np.ndarray, "B max_new_tokens"]
    """New tokens only, int32; 0 after the end of a row."""
    lengths: Int[np.ndarray, " B"]
    """Number of new tokens of each row, without the stop token."""
    ended: list[str | None]
    """What has ended each row, "stop" or "length"; None where `on_tokens` did."""
    logprobs: Float[np.ndarray, "B max_new_tokens"]
    """Log-probability of each token among the tokenizer's ids, f32, before any rule or
    temperature; 0 after the end."""
    top_tokens: Int[np.ndarray, "B max_new_tokens n"]
    """The `top_logprobs` most likely tokens in the place of each, the first first."""
    top_logprobs: Float[np.ndarray, "B max_new_tokens n"]
    """Their log-probabilities, as `logprobs`."""
    prefill_s: float
    """Seconds for the prompts, without compiling and preparing the weights."""
    decode_s: float
    """Seconds for decoding, without compiling."""
    compile_s: float
    """Seconds of compiling; 0 if the programs were compiled before."""
    prefill_tokens: Int[np.ndarray, " B"]
    """Tokens of each prompt that were prefilled: all that `resume` did not hold."""
    traces: list[Trace]
    """For each row what the taps have read, on the host: of the prompt and of the new
    tokens, without a batch axis. Index t of the tokens is position t."""
    cache_bytes: int
    """Bytes of keys and values on a device, used or not."""
    num_proposed: Int[np.ndarray, " B"]
    """Tokens that `speculate` has guessed in each row; 0 without it."""
    num_accepted: Int[np.ndarray, " B"]
    """Those of them that became new tokens."""
    state: GenerationState | None
    """What a next call can go on from; None unless `return_state`."""

    @property
    def rows(self) -> list[Int[np.ndarray, " _"]]:
        """The new tokens of each row, without padding."""
        pairs = zip(self.tokens, self.lengths, strict=True)
        return [row[:length] for row, length in pairs]

    @property
    def mean_logprobs(self) -> Float[np.ndarray, " B"]:
        """Mean log-probability of the tokens of each row; 0 for a row without any.

        Of n samples of one prompt, the best has the largest.
        """
        sums = self.logprobs.sum(axis=1, dtype=np.float64)
        return sums / np.maximum(self.lengths, 1)

    def best(self, count: int) -> "Generation":
        """Returns the `count` rows with the largest mean log-probability, best first.

        Without the state, which is that of all rows.
        """
        return self.take(np.argsort(-self.mean_logprobs, kind="stable")[:count])

    def take(self, chosen: Int[np.ndarray, " n"]) -> "Generation":
        """Returns the rows of these numbers, without the state of all."""
        arrays = {
            field.name: value[chosen]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        ended = [self.ended[row] for row in chosen]
        traces = [self.traces[row] for row in chosen]
        return replace(self, **arrays, ended=ended, traces=traces, state=None)


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]]
    | Sequence[Integer[np.ndarray, " _"]]
    | Integer[np.ndarray | Array, "B _"],
    sample: SampleConfig | Sequence[SampleConfig] | None = None,
    key: Key[Array, ""] | Key[Array, " B"] | int | None = None,
    *,
    num_tokens: int | None = None,
    token_bytes: Sequence[bytes] | None = None,
    top_logprobs: int = 0,
    on_tokens: OnTokens | None = None,
    resume: GenerationState | None = None,
    return_state: bool = False,
    edits: Sequence[Edit] = (),
    taps: Sequence[Tap] = (),
    grammars: Sequence[Automaton | None] | None = None,
    cache: CacheKind = "full",
    num_slots: int = 64,
    block: type[Block] = Block,
    speculate: Proposer | None = None,
    **unknown: Any,
) -> Generation:
    """Continues each prompt.

    A row's result depends on its prompt, its config and its key, not on the other rows,
    their lengths or their number.

    With `resume`, each row keeps the longest prefix that its prompt shares with the
    tokens of that row in the state, and the rest is prefilled. The result is that of a
    call without it, up to the rounding of sums in another order.

    Args:
      params: stacked over layers, as `init` and `load` return them.
      prompts: rows of token ids, at least one each; lengths may differ.
      sample: how to sample, and when to stop: `stop_ids` are usually the tokenizer's.
        One for all rows, or one for each. None takes the defaults, which stop at no
        token.
      key: a seed, or a typed PRNG key, from which each row's own is made by its number
        (`jax.random.fold_in`), or a key for each row. None is seed 0, which gives the
        same texts each time.
      num_tokens: only ids below this are sampled: those that the tokenizer has. None
        takes `config.vocab_size`.
      token_bytes: `tokenizer.token_bytes`, which stop strings and DRY need. The tokens
        of a stop string are among the result's, since it may end inside a token;
        `StopText` cuts it off the text.
      top_logprobs: how many of the most likely tokens to report at each token.
      on_tokens: called with the new tokens, of each row 1, then 2, 4, 8 and from there
        on 16 at once, and a mask of those that belong to the text; returning True ends
        the generation.
      resume: the state of an earlier call with as many prompts and the same model. Its
        memory is used for this call, so it cannot be used again.
      return_state: keep the cache, as `state` of the result.
      edits: changes of sites, in the prompts and in new tokens; position p is token p
        of a row, its prompt included. What `resume` kept is not computed again. Logits
        at a position are those of the next token.
      taps: sites to read at all tokens, while they are computed. Not with `resume`.
      grammars: for each row None or an automaton that its text follows; see `Request`.
      cache: how keys and values are kept. `full`: all tokens; `ring`: layers with a
        window have room for that and a few tokens, with the same result; `int8`: all,
        rounded to 8 bits; `int4`: to 4 bits; `ring_int8`, `ring_int4`: both.
      num_slots: rows that are decoded at once; others wait, and take the place of those
        that end, with a bar on the terminal. With `resume` or `return_state` all are
        decoded at once.
      block: what computes a layer; see `Block`.
      speculate: what guesses the next tokens, several of which are then read in one
        pass: `PromptLookup` or a `DraftModel`. The texts are those without it, up to
        the rounding of sums in another order. Not with taps.

    Raises:
      TypeError: for an argument that does not exist.
      ValueError: for arguments of another type, an empty prompt, an id outside the
        vocabulary, a prompt that is too long for the context with max_new_tokens, a
        cache that does not fit into memory, logits that are not finite, a state that
        was used or belongs to another model or number of prompts, taps or edits that
        cannot be, or an edit that has changed nothing.
    """
    check_unknown(unknown)
    check_model(config, params, block)
    num_tokens = config.vocab_size if num_tokens is None else num_tokens
    check_count("num_tokens", num_tokens, 1, config.vocab_size)
    check_count("top_logprobs", top_logprobs, 0, config.vocab_size)
    rows = row_ids(prompts, num_tokens)
    keys = row_keys(key, len(rows))
    samples = row_samples(sample, len(rows))
    check_samples(config, samples, num_tokens, token_bytes)
    grammars = row_grammars(grammars, len(rows))
    needed = [len(r) + s.max_new_tokens for r, s in zip(rows, samples, strict=True)]
    for i, (row, one) in enumerate(zip(rows, samples, strict=True)):
        check_room(f"prompt {i}", row, one.max_new_tokens, config.context_length)
    check_edits(edits, sizes(config), absent_sites(config))
    check_generation_taps(config, taps)
    max_length = capacity(max(needed), config.context_length)
    if resume is not None:
        if taps:
            raise ValueError("resume holds tokens that taps cannot read: leave it out")
        num_filled = len(rows) + -len(rows) % batch_parts()
        check_state(resume, config, params, block, cache, num_filled)
        max_length = max(max_length, resume.max_length)
    together = len(rows) <= num_slots or resume is not None or return_state
    engine = Engine(
        *(config, params),
        num_slots=len(rows) if together else num_slots,
        max_length=max_length,
        num_tokens=num_tokens,
        token_bytes=token_bytes,
        top_logprobs=top_logprobs,
        steps=CHUNK,
        cache=cache,
        edits=edits,
        taps=taps,
        resume=resume,
        block=block,
        speculate=speculate,
    )
    for request in zip(rows, samples, keys, grammars, strict=True):
        engine.submit(Request(*request))
    if together:
        kept = engine.begin().kept[: len(rows)]
    else:
        kept = np.zeros(len(rows), np.int32)
        engine.share_beginning()
    with progress_bar("generating", len(rows), "texts") as show:
        texts = _run(engine, len(rows), on_tokens, None if together else show)
    check_hits(edits, engine.hits)
    return _collected(
        *(engine, texts, samples),
        prefill_tokens=np.array([len(row) for row in rows], np.int32) - kept,
        traces=[joined(taps, [part.trace for part in text]) for text in texts],
        state=engine.generation_state() if return_state else None,
    )


def _collected(
    engine: Engine,
    texts: list[list[NewTokens]],
    samples: Sequence[SampleConfig],
    **others: Any,
) -> Generation:
    """Puts the parts of each text together.

    Args:
      others: what the parts do not tell, by the names of `Generation`.
    """
    most = max(sample.max_new_tokens for sample in samples)

    def padded(name: str) -> np.ndarray:
        one = getattr(next(text for text in texts if text)[0], name)
        out = np.zeros((len(texts), most, *one.shape[1:]), one.dtype)
        for row, text in zip(out, texts, strict=True):
            parts = [getattr(part, name) for part in text]
            row[: sum(map(len, parts))] = np.concatenate([one[:0], *parts])
        return out

    def sums(name: str) -> np.ndarray:
        return np.array([sum(getattr(p, name) for p in t) for t in texts], np.int32)

    return Generation(
        tokens=padded("tokens"),
        lengths=np.array([sum(len(p.tokens) for p in t) for t in texts], np.int32),
        ended=[text[-1].ended if text else None for text in texts],
        logprobs=padded("logprobs"),
        top_tokens=padded("top_tokens"),
        top_logprobs=padded("top_logprobs"),
        prefill_s=engine.clock.prefill_s,
        decode_s=engine.clock.decode_s,
        compile_s=engine.clock.compile_s,
        cache_bytes=engine.cache_bytes,
        num_proposed=sums("num_proposed"),
        num_accepted=sums("num_accepted"),
        **others,
    )


def _run(
    engine: Engine,
    num_rows: int,
    on_tokens: OnTokens | None,
    show: Callable[[int], None] | None,
) -> list[list[NewTokens]]:
    """Steps until all texts have ended; returns the parts of each.

    Args:
      show: called with the number of texts that have ended.
    """
    texts: list[list[NewTokens]] = [[] for _ in range(num_rows)]
    # Who listens hears the first token soon.
    most = CHUNK if on_tokens is None else 1
    while not engine.is_idle:
        found = engine.step(most)
        most = min(2 * most, CHUNK)
        if show is not None:
            show(num_rows - engine.num_waiting - engine.num_running)
        for part in found:
            if part.error is not None:
                raise part.error
            texts[part.number].append(part)
        if on_tokens is not None and found:
            width = max(len(part.tokens) for part in found)
            new, inside = np.zeros((2, num_rows, width), np.int32)
            for part in found:
                new[part.number, : len(part.tokens)] = part.tokens
                inside[part.number, : len(part.tokens)] = True
            if on_tokens(new, inside.astype(bool)) is True:
                break
    return texts
