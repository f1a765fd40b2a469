"""Decoding of many requests at once, in slots: as one ends, the next takes its place.

A slot is a row of the batch. The state of a batch is one value (`DecodeState`), and
what a row draws depends on its own prompt, settings and key only: not on its slot, on
its neighbours or on when it joined. Requests that come and go compile nothing, except
for a prompt of a size that was not there before (`prefill.py`).
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlm.config import CacheKind, ModelConfig, SampleConfig
from jaxlm.infer.check_arguments import (
    check_cache,
    check_grammar,
    check_room,
    check_samples,
    check_speculation,
    row_ids,
)
from jaxlm.infer.decoding import DecodeState, Program, Programs, Rows
from jaxlm.infer.decoding import programs as programs_of
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.generation_trace import joined, row_of_steps
from jaxlm.infer.prefill import Prefilled, bucket, chunk_widths, prefill
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.rules.automata import (
    ENDED,
    FREE,
    Automata,
    Automaton,
    NoRoom,
    StateTable,
)
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.rules.stop_strings import stop_automaton
from jaxlm.infer.speculative.proposals import DraftModel, Proposer
from jaxlm.model.block import Block
from jaxlm.model.checks import check_model
from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import Cache, LayerCache, unstack_layers
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.processes import whole
from jaxlm.sharding.rules import activation_spec, batch_parts
from jaxlm.types import Params, Trace

Layers = tuple[LayerCache, ...]


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how it is continued."""

    tokens: Int[np.ndarray, " _"]
    """The prompt, int32: at least one token."""
    sample: SampleConfig
    key: Key[Array, ""]
    """All draws of this text follow from it."""
    grammar: Automaton | None = None
    """What the new text follows, as `token_grammar` makes it for the same `sample`.
    Requests with the same object share its place in memory."""


@dataclass(frozen=True, eq=False)
class NewTokens:
    """What a step adds to the text of a request."""

    number: int
    """Of the request, as `Engine.submit` returned it."""
    tokens: Int[np.ndarray, " n"]
    """int32, those of a stop string included, without a stop token."""
    logprobs: Float[np.ndarray, " n"]
    """Log-probability of each among the tokenizer's ids, f32, before any rule."""
    top_tokens: Int[np.ndarray, "n top"]
    """The most likely tokens in the place of each, the first first."""
    top_logprobs: Float[np.ndarray, "n top"]
    """Their log-probabilities."""
    ended: Literal["stop", "length", "error"] | None
    """Why the text ends here; None: it goes on."""
    trace: Trace
    """What the taps have read at these tokens; the first has the prompt's too."""
    num_proposed: int = 0
    """Tokens that `speculate` has guessed."""
    num_accepted: int = 0
    """Those of them that are among `tokens`."""
    error: Exception | None = None
    """What has failed, of this request only."""


@dataclass
class _Running:
    number: int
    request: Request
    automata: dict[Any, int]
    length: int = 0
    """New tokens so far."""
    prompt_trace: Trace | None = None


@dataclass
class Clock:
    """Seconds of the stages of decoding, without compiling."""

    programs: Programs
    prefill_s: float = 0.0
    decode_s: float = 0.0
    _compiled_before: float = field(init=False)
    _last: float = field(init=False, default=0.0)

    def __post_init__(self):
        self._compiled_before = self.programs.compile_s
        self.lap()

    @property
    def compile_s(self) -> float:
        """Seconds of compiling."""
        return self.programs.compile_s - self._compiled_before

    def lap(self) -> float:
        """Returns the seconds since the last call, without compiling."""
        now = time.perf_counter() - self.programs.compile_s
        before, self._last = self._last, now
        return now - before


class Engine:
    """Runs requests in `num_slots` slots. It belongs to one thread."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        num_slots: int,
        max_length: int | None = None,
        num_tokens: int | None = None,
        token_bytes: Sequence[bytes] | None = None,
        top_logprobs: int = 0,
        steps: int = 8,
        cache: CacheKind = "full",
        edits: Sequence[Edit] = (),
        taps: Sequence[Tap] = (),
        resume: GenerationState | None = None,
        block: type[Block] = Block,
        speculate: Proposer | None = None,
    ):
        """Prepares the parameters; the cache is made with the first request.

        Args:
          params: stacked over layers, as `init` and `load` return them.
          num_slots: requests that run at once; rounded up to fill a mesh.
          max_length: tokens of a prompt and its new text together; None: the model's
            context.
          num_tokens: only ids below this are sampled; None: `config.vocab_size`.
          token_bytes: as for `generate`.
          top_logprobs: how many of the most likely tokens to report at each token.
          steps: tokens that each text grows by in a step.
          cache: its kind, as for `generate`.
          edits, taps: as for `generate`, of all requests.
          resume: what `begin` goes on from.
          block: what computes a layer; see `Block`.
          speculate: as for `generate`.

        Raises:
          ValueError: for a model that cannot be, a cache that does not fit, or a way
            to speculate that cannot be.
        """
        check_model(config, params, block)
        num_slots += -num_slots % batch_parts()
        self._slots: list[_Running | None] = [None] * num_slots
        self.config, self.params, self.block = config, params, block
        self.max_length = max_length or config.context_length
        self.num_tokens = num_tokens or config.vocab_size
        self.token_bytes = None if token_bytes is None else tuple(token_bytes)
        self.num_top = top_logprobs
        self.cache: CacheKind = cache
        self._spare = 0
        if speculate is not None:
            check_speculation(speculate, config, self.max_length, taps)
            self._spare = speculate.num_speculative_tokens
            # As many tokens, if half of the guesses are right.
            steps = -(-2 * steps // (self._spare + 1))
        size = (num_slots, self.max_length, cache, self._spare)
        self.cache_bytes = check_cache(config, params, *size)
        """Bytes of the cache of all slots, on a device."""
        self._edits = jax.tree.map(jnp.asarray, tuple(edits))
        self._taps = jax.tree.map(jnp.asarray, tuple(taps))
        top = bucket(top_logprobs, config.vocab_size) if top_logprobs else 0
        self._programs = programs_of(
            *(config, self.max_length, cache, steps, top, block, self._spare)
        )
        self.clock = Clock(self._programs)
        self._draft: DraftModel | None = None
        self._proposer = speculate
        if isinstance(speculate, DraftModel):
            self._draft = speculate
            self._draft_programs = programs_of(
                *(speculate.config, self.max_length, cache, 1, 0, Block, self._spare)
            )
            self.cache_bytes += check_cache(speculate.config, speculate.params, *size)
            split = self._draft_programs.split(speculate.params)
            self._proposer = replace(speculate, params=split)
        self._resume = resume
        split = self._programs.split(params) if resume is None else resume.split_params
        self._split = jax.block_until_ready(split)
        self._automata = Automata(config.vocab_size)
        self._table = self._automata.table, self._device_table()
        self._waiting: deque[tuple[int, Request]] = deque()
        # What they wait for is compiled, or there is no room for their automata.
        self._deferred: list[tuple[int, Request, Future[None] | None]] = []
        self._compiling: dict[tuple[str, int], Future[None] | None] = {}
        self._num_submitted = 0
        self._state: DecodeState | None = None
        self._last_prompt: tuple[bytes, tuple[Prefilled, Layers]] | None = None

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting) + len(self._deferred)

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return sum(slot is not None for slot in self._slots)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.num_waiting and not self.num_running

    def submit(self, request: Request) -> int:
        """Queues a request, and returns its number: 0, 1, 2 ...

        Raises:
          ValueError: for a request that cannot be run.
        """
        (tokens,) = row_ids([request.tokens], self.num_tokens)
        check_samples(self.config, [request.sample], self.num_tokens, self.token_bytes)
        new = request.sample.max_new_tokens
        check_room("the prompt", tokens, new, self.max_length)
        if request.grammar is not None:
            check_grammar(request.grammar, self.config.vocab_size, new)
        self._waiting.append((self._num_submitted, request))
        self._num_submitted += 1
        return self._num_submitted - 1

    def cancel(self, number: int) -> None:
        """Drops a request, which may wait, run or have ended."""
        self._waiting = deque(w for w in self._waiting if w[0] != number)
        self._deferred = [d for d in self._deferred if d[0] != number]
        for slot, running in enumerate(self._slots):
            if running is not None and running.number == number:
                self._free(slot)

    def step(self) -> list[NewTokens]:
        """Gives free slots to waiting requests, and continues all texts by some tokens.

        What fails for one request is its `error`, and does not stop the others: logits
        that are not finite, or a prompt for which memory does not suffice. A request
        for which something must be compiled first waits for that while others run.
        """
        failed = self._admit()
        if not self.num_running:
            return failed
        assert self._state is not None
        self.clock.lap()
        state, drawn, trace = self._programs.decode(
            *(self._split, self._state, self._table[1]),
            *(np.int32(self.num_tokens), (self._edits, self._taps), self._proposer),
        )
        self._state, rows = state, state.rows
        ends = (rows.is_done, rows.stop_states, rows.grammar_states)
        drawn, trace, (is_done, *states) = whole((drawn, trace, ends))
        if self._proposer is not None:
            drawn = jax.tree.map(_in_a_row, drawn)
        self.clock.decode_s += self.clock.lap()
        has_ended = np.any([x == ENDED for x in states], axis=0)
        return failed + [
            self._update(
                *(slot, drawn, trace, bool(is_done[slot]), bool(has_ended[slot]))
            )
            for slot, running in enumerate(self._slots)
            if running is not None
        ]

    def _update(
        self, slot: int, drawn: Any, trace: Trace, is_done: bool, has_ended: bool
    ) -> NewTokens:
        running = self._slots[slot]
        assert running is not None
        if np.isnan(drawn.logprobs[slot]).any():
            self._free(slot)
            error = ValueError(
                "the model's logits are not finite: its parameters hold NaN or "
                "infinities, or the compute dtype overflows (compute in float32)"
            )
            return self._failed(running.number, error)
        inside = drawn.inside[slot]
        count = int(inside.sum())
        running.length += count
        own = row_of_steps(self._taps, trace, slot, count)
        if running.prompt_trace is not None:
            own = joined(self._taps, [running.prompt_trace, own])
            running.prompt_trace = None
        is_full = running.length == running.request.sample.max_new_tokens
        if is_done:
            self._free(slot)
        return NewTokens(
            running.number,
            drawn.tokens[slot, inside],
            drawn.logprobs[slot, inside],
            drawn.top_tokens[slot, inside, : self.num_top],
            drawn.top_logprobs[slot, inside, : self.num_top],
            ("length" if is_full and not has_ended else "stop") if is_done else None,
            own,
            *_num_guesses(drawn.is_proposed, inside, slot),
        )

    def _failed(self, number: int, error: Exception) -> NewTokens:
        none, top = np.zeros(0, np.float32), np.zeros((0, self.num_top), np.float32)
        parts = (none.astype(np.int32), none, top.astype(np.int32), top)
        return NewTokens(number, *parts, "error", {}, error=error)

    def _free(self, slot: int) -> None:
        running = self._slots[slot]
        assert running is not None
        self._automata.release(running.automata)
        self._slots[slot] = None

    def begin(self) -> Prefilled:
        """Gives all waiting requests slots at once, and reads their prompts together.

        For requests that start together. Only where nothing has run, and there are
        slots enough; with `resume`, a request for each of its rows.
        """
        assert self._state is None and self.num_waiting <= len(self._slots)
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        running = [self._hold(number, request) for number, request in waiting]
        self._slots[: len(running)] = running
        # Slots without a request repeat the first: nothing reads them.
        rows = running + running[:1] * (len(self._slots) - len(running))
        found, draft = self._prefill([r.request.tokens for r in rows], self._resume)
        self._state = self._state_of(rows, found, draft)
        for row, trace in zip(running, found.traces, strict=False):
            row.prompt_trace = trace
        self.clock.prefill_s += self.clock.lap()
        return found

    def _admit(self) -> list[NewTokens]:
        """Fills free slots; returns what has become of requests that cannot run."""
        failed, deferred = [], self._deferred
        # First those for which everything is compiled now.
        is_ready = [future is None or future.done() for _, _, future in deferred]
        pairs = list(zip(deferred, is_ready, strict=True))
        self._deferred = [one for one, ready in pairs if not ready]
        self._waiting.extendleft(one[:2] for one, ready in reversed(pairs) if ready)
        for slot in range(len(self._slots)):
            while self._slots[slot] is None and self._waiting:
                number, request = self._waiting.popleft()
                try:
                    self._join(slot, number, request)
                except (ValueError, jax.errors.JaxRuntimeError) as error:
                    failed.append(self._failed(number, error))
        return failed

    def _join(self, slot: int, number: int, request: Request) -> None:
        """Gives a request a slot, or defers it.

        Raises:
          ValueError, JaxRuntimeError: for a request that cannot be run; no other is
            touched.
        """
        self.clock.lap()
        try:
            future = self._to_compile(request)
        except NoRoom:
            if not self.num_running:
                raise
            self._deferred.append((number, request, None))
            return
        if future is not None:
            self._deferred.append((number, request, future))
            return
        running = self._hold(number, request)
        try:
            data = request.tokens.tobytes()
            if self._last_prompt is None or self._last_prompt[0] != data:
                rows = [request.tokens] * batch_parts()
                self._last_prompt = data, self._prefill(rows, None)
            found, draft = self._last_prompt[1]
            running.prompt_trace = found.traces[0]
            row = self._state_of([running] * batch_parts(), found, draft)
        except Exception:
            self._automata.release(running.automata)
            raise
        self._slots[slot] = running
        if self._state is None:
            self._state = self._empty_state()
        state = self._programs.insert(self._state, row, np.int32(slot))
        self._state = jax.block_until_ready(state)
        self.clock.prefill_s += self.clock.lap()

    def _to_compile(self, request: Request) -> Future[None] | None:
        """Compiles beside what a request needs; None if it can join now.

        Where no text has begun, it is compiled when it is called.
        """
        size = self._automata.size_with(self._automata_of(request))
        widths = chunk_widths(len(request.tokens), batch_parts(), self.max_length)
        rows, probes = batch_parts(), (self._edits, self._taps)
        needs: dict[tuple[str, int], tuple[Program, Callable[[], Any]]] = {}

        def decoding() -> Any:
            needs = jnp.zeros(size, np.int16)
            states = jnp.zeros((size, self.config.vocab_size), np.int16)
            table, num_tokens = StateTable(states, needs), np.int32(self.num_tokens)
            return (
                *(self._split, self._state, table, num_tokens, probes),
                self._proposer,
            )

        def prompt() -> Any:
            tokens = np.zeros((rows, widths[0]), np.int32)
            return self.params, tokens, np.zeros(rows, np.int32), probes

        if size > len(self._automata.table):
            needs["table", size] = self._programs.decode, decoding
        if len(widths) == 1:
            needs["prompt", widths[0]] = self._programs.begin, prompt
        has_begun = any(running and running.length for running in self._slots)
        for key, (program, arguments) in needs.items():
            if has_begun and key not in self._compiling:
                self._compiling[key] = program.compile_beside(*arguments())
            future = self._compiling.get(key)
            if future is not None and has_begun and not future.done():
                return future
            if future is not None:
                future.result()
        return None

    def _prefill(
        self, rows: list[Int[np.ndarray, " _"]], resume: GenerationState | None
    ) -> tuple[Prefilled, Layers]:
        """Returns prompts in the cache, and the cache of the draft model."""
        found = prefill(
            *(self.config, self._programs, self.params, rows, self.max_length),
            *((self._edits, self._taps), resume, self._spare),
        )
        jax.block_until_ready(found.logits)
        if self._draft is None:
            return found, ()
        draft, programs = self._draft, self._draft_programs
        none = ((), ())
        own = prefill(draft.config, programs, draft.params, rows, self.max_length, none)
        jax.block_until_ready(own.logits)
        return found, own.layers

    def _automata_of(self, request: Request) -> dict[Any, Automaton]:
        automata: dict[Any, Automaton] = {}
        if request.sample.stop_strings:
            strings = request.sample.stop_strings
            assert self.token_bytes is not None
            automata[strings] = stop_automaton(
                strings, self.token_bytes, self.config.vocab_size
            )
        if request.grammar is not None:
            automata[id(request.grammar)] = request.grammar
        return automata

    def _hold(self, number: int, request: Request) -> _Running:
        """Puts the automata of a request into the table."""
        held = self._automata.hold(self._automata_of(request))
        running = _Running(number, request, held)
        if self._table[0] is not self._automata.table:
            self._table = self._automata.table, self._device_table()
        return running

    def _device_table(self) -> StateTable:
        table, needs = self._automata.table, self._automata.needs
        return StateTable(jnp.asarray(table), jnp.asarray(needs))

    def _state_of(
        self, running: Sequence[_Running], found: Prefilled, draft: Layers
    ) -> DecodeState:
        """Returns the state of rows that have no new token yet."""
        requests = [r.request for r in running]
        tokens = np.zeros((len(running), self.max_length), np.int32)
        for new, request in zip(tokens, requests, strict=True):
            new[: len(request.tokens)] = request.tokens
        lengths = np.array([len(r.tokens) for r in requests], np.int32)
        stops = [r.automata.get(r.request.sample.stop_strings, FREE) for r in running]
        grammars = [r.automata.get(id(r.request.grammar), FREE) for r in running]
        rows = Rows(
            History(tokens, lengths, lengths.copy()),
            np.array(stops, np.int32),
            np.array(grammars, np.int32),
            np.array([r.number < 0 for r in running]),
        )
        keys = jnp.stack([request.key for request in requests])
        samples = [request.sample for request in requests]
        settings = row_settings(samples, self.config.vocab_size, self.token_bytes or ())
        filled, rows, keys, settings = self._programs.place(
            (lengths, rows, keys, settings)
        )
        cache = Cache(found.layers, filled)
        return DecodeState(cache, found.logits, rows, keys, settings, found.hits, draft)

    def _empty_state(self) -> DecodeState:
        """Returns a state of slots in which nothing runs."""
        config, num_slots = self.config, len(self._slots)
        layers = self._empty_layers(config)
        draft = () if self._draft is None else self._empty_layers(self._draft.config)
        logits = jnp.zeros(
            (num_slots, config.vocab_size),
            jnp.float32,
            out_sharding=activation_spec("B_"),
        )
        nothing = Request(np.ones(1, np.int32), SampleConfig(), jax.random.key(0))
        hits = (jnp.int32(0),) * len(self._edits)
        found = Prefilled(layers, logits, np.zeros(num_slots, np.int32), hits, [])
        return self._state_of([_Running(-1, nothing, {})] * num_slots, found, draft)

    def _empty_layers(self, config: ModelConfig) -> Layers:
        size = (len(self._slots), self.max_length)
        cache = init_cache(config, *size, kind=self.cache, spare=self._spare)
        return unstack_layers(cache.layers, config.num_layers)

    @property
    def hits(self) -> tuple[Any, ...]:
        """How often each edit has fired."""
        return () if self._state is None else self._state.hits

    def generation_state(self) -> GenerationState:
        """Returns what a later call can go on from.

        The engine cannot be used after it.
        """
        assert self._state is not None
        history = whole(self._state.rows.history)
        lengths = np.minimum(history.lengths, self.max_length)
        pairs = zip(history.tokens, lengths, strict=True)
        rows = [row[:length] for row, length in pairs]
        return GenerationState(
            *(self.config, self.params, self.block, self.cache, self.max_length),
            *(self._spare, self._split, rows, self._state.cache),
        )


def _in_a_row(x: np.ndarray) -> np.ndarray:
    """[B, passes, K + 1, ...] -> [B, passes * (K + 1), ...]."""
    return x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:])


def _num_guesses(is_proposed: Any, inside: np.ndarray, slot: int) -> tuple[int, int]:
    """Returns how many tokens of a row were guessed, and how many of these it has."""
    if is_proposed is None:
        return 0, 0
    proposed = is_proposed[slot]
    return int(proposed.sum()), int((proposed & inside).sum())
