"""Decoding of many requests at once, in slots: as one ends, the next takes its place.

A slot is a row of the batch. The state of a batch is one value (`DecodeState`), and
what a row draws depends on its own prompt, settings and key only: not on its slot, on
its neighbours or on when it joined. Requests that come and go compile nothing, except
for a prompt of a size that was not there before (`prompt_reader.py`).
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import CacheKind, ModelConfig
from jaxlm.infer.check_arguments import (
    check_cache,
    check_grammar,
    check_room,
    check_samples,
    check_speculation,
    row_ids,
)
from jaxlm.infer.decoding.decoding_spec import DecodingSpec
from jaxlm.infer.decoding.model_programs import programs_of
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.prefill import (
    PREFILL_TOKENS,
    CompiledModel,
    Prefilled,
    bucket,
    prefill,
)
from jaxlm.infer.rules.automata import NoRoom, StateTable
from jaxlm.infer.slots.automaton_table import AutomatonTable
from jaxlm.infer.slots.clock import Clock
from jaxlm.infer.slots.compile_beside import CompileBeside, Needs, to_read
from jaxlm.infer.slots.prompt_reader import Group, PromptReader, ReadSize
from jaxlm.infer.slots.slot_batch import SlotBatch
from jaxlm.infer.slots.slot_request import NewTokens, Request, Running
from jaxlm.infer.slots.step_result import StepResult
from jaxlm.infer.speculative.proposals import DraftModel, Proposer
from jaxlm.model.block import Block
from jaxlm.model.checks import check_model
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.processes import whole
from jaxlm.sharding.rules import batch_parts
from jaxlm.types import Params

# For programs, before the engine looks again for requests that can run without them.
_LONGEST_WAIT_SECONDS = 0.02


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
        prompt_tokens: int = PREFILL_TOKENS,
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
          steps: tokens that each text grows by in a step; about as many with
            `speculate`. Between steps a stream prints its text, requests come and go,
            and generation can stop.
          prompt_tokens: tokens of prompts that a step reads at most, padding included:
            a longer prompt is read over several steps.
          cache: its kind, as for `generate`.
          edits, taps: as for `generate`, of all requests.
          resume: what `begin` goes on from.
          block: what computes a layer; see `Block`.
          speculate: as for `generate`.

        Raises:
          ValueError: for a model that cannot be, no slots, a cache that does not fit,
            or a way to speculate that cannot be.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}: it must be at least 1")
        check_model(config, params, block)
        num_slots += -num_slots % batch_parts()
        self._slots: list[Running | None] = [None] * num_slots
        self.config, self.params, self.block = config, params, block
        self.max_length = max_length or config.context_length
        self.num_tokens = num_tokens or config.vocab_size
        self.token_bytes = None if token_bytes is None else tuple(token_bytes)
        self.num_top, self._prompt_tokens = top_logprobs, prompt_tokens
        spare = 0
        if speculate is not None:
            check_speculation(speculate, config, self.max_length, taps)
            spare = speculate.num_speculative_tokens
            # As many tokens, if a pass yields half of what it may.
            steps = -(-2 * steps // (spare + 1))
        self._steps = steps
        top = bucket(top_logprobs, config.vocab_size) if top_logprobs else 0
        spec = DecodingSpec(config, self.max_length, cache, top, block, spare)
        spec = spec.for_rows(num_slots * (1 + spare))
        self._models = self._make_models(spec, edits, taps, speculate)
        self._programs = self._models[0].programs
        size = (self.max_length, cache, spare)
        self.cache_bytes = sum(
            check_cache(model.programs.spec.config, model.params, num_slots, *size)
            for model in self._models
        )
        """Bytes of the cache of all slots, on a device."""
        self._resume, self.clock = resume, Clock(self._programs)
        self._split, self._proposer = self._split_params(speculate)
        self.clock.lap()  # Preparing the weights is no part of reading a prompt.
        self._batch = SlotBatch(self._models, num_slots, self.token_bytes or ())
        self._prompts = PromptReader(self._models, num_slots, prompt_tokens)
        self._automata = AutomatonTable(config.vocab_size, self.token_bytes)
        self._waiting: deque[tuple[int, Request]] = deque()
        # Each with the program that it waits for; None: there was no room for its
        # automata.
        self._deferred: list[tuple[int, Request, Future[None] | None]] = []
        self._compiling = CompileBeside()
        self._ahead: deque[ReadSize] = deque()
        self._num_submitted = 0

    def _make_models(
        self,
        spec: DecodingSpec,
        edits: Sequence[Edit],
        taps: Sequence[Tap],
        speculate: Proposer | None,
    ) -> list[CompiledModel]:
        """Returns the model, and its draft model if there is one."""
        probes = jax.tree.map(jnp.asarray, (tuple(edits), tuple(taps)))
        models = [CompiledModel(programs_of(spec), self.params, probes)]
        if isinstance(speculate, DraftModel):
            draft = replace(spec, config=speculate.config, num_top=0, block=Block)
            draft = draft.for_rows(len(self._slots))
            models.append(CompiledModel(programs_of(draft), speculate.params, ((), ())))
        return models

    def _split_params(
        self, speculate: Proposer | None
    ) -> tuple[Params, Proposer | None]:
        """Returns the parameters as decoding reads them, those of a draft too."""
        if isinstance(speculate, DraftModel):
            split = self._models[1].programs.split(speculate.params)
            speculate = replace(speculate, params=split)
        if self._resume is not None and self._resume.spare == self._programs.spec.spare:
            return self._resume.split_params, speculate
        return jax.block_until_ready(self._programs.split(self.params)), speculate

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
        for running in self._slots:
            if running is not None and running.number == number:
                self._prompts.drop(running)
                self._free(running)

    def begin(self) -> Prefilled:
        """Gives all waiting requests slots at once, and reads their prompts together.

        For requests that start together. Only where nothing has run, and there are
        slots enough; with `resume`, a request for each of its rows.
        """
        assert self._batch.state is None and self.num_waiting <= len(self._slots)
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        running = [self._hold(*one) for one in waiting]
        self._slots[: len(running)] = running
        # Slots without a request repeat the first: nothing reads them.
        rows = running + running[:1] * (len(self._slots) - len(running))
        prompts = [r.request.tokens for r in rows]
        own, *drafts = self._models
        found = [prefill(own, prompts, self._resume)]
        found += [prefill(draft, prompts) for draft in drafts]
        self._batch.state = self._batch.state_of(rows, jax.block_until_ready(found))
        for row, trace in zip(running, found[0].traces, strict=False):
            row.prompt_trace, row.is_read = trace, True
        self.clock.prefill_s += self.clock.lap()
        return found[0]

    def share_beginning(self) -> None:
        """Reads a long beginning of all waiting prompts, once for all of them.

        No other request may follow: its prompt would have to begin so too.
        """
        rows = [request.tokens for _, request in self._waiting]
        self._prompts.share_beginning(rows)
        self.clock.prefill_s += self.clock.lap()

    def compile(self) -> None:
        """Compiles what steps run, ahead of the first request."""
        self._batch.make()
        for future in self._compiling.start(self._to_decode(self._automata.size)):
            future.result()
        self._ahead = deque(self._prompts.short_sizes())

    def compile_next(self) -> bool:
        """Compiles what prompts of one more size need; returns whether it had to.

        After `compile`, while there is nothing else to do.
        """
        if not self._ahead:
            return False
        for future in self._compiling.start(self._to_read(self._ahead.popleft())):
            future.exception()  # The request that needs the program is told.
        return True

    def step(self, most: int | None = None) -> list[NewTokens]:
        """Gives free slots to waiting requests, and continues all texts by some tokens.

        These are `steps` of the constructor, or `most` if that is less.

        Prompts are read before that, up to `prompt_tokens`: a longer one in several
        steps. What fails for one request is its `error`, and does not stop the others:
        logits that are not finite, or a prompt for which memory does not suffice. A
        request for which something must be compiled waits for that while others run.
        Where all wait, so does the step, for a moment.
        """
        self.clock.lap()
        failed = self._admit()
        if self._deferred and not self.num_running and not failed:
            # All wait for programs. A request that comes now may need none.
            futures = [future for *_, future in self._deferred if future is not None]
            self.clock.wait(futures, _LONGEST_WAIT_SECONDS)
            failed = self._admit()
        failed += self._read()
        self.clock.prefill_s += self.clock.lap()
        running = [one for one in self._slots if one is not None and one.is_read]
        if not running:
            return failed
        limit = self._steps if most is None else min(most, self._steps)
        arguments = self._decoding(self._automata.on_device, limit)
        state, drawn, trace = self._programs.decode(*arguments, steps=self._steps)
        self._batch.state = state
        taps = self._models[0].probes[1]
        result = StepResult(drawn, trace, state.rows, taps)
        self.clock.decode_s += self.clock.lap()
        return failed + [self._update(one, result) for one in running]

    def _update(self, running: Running, result: StepResult) -> NewTokens:
        slot = self._slots.index(running)
        if not result.is_finite(slot):
            self._free(running)
            # A hidden value of NaN times 0 would reach the next text in this slot.
            self._batch.clear(slot)
            error = ValueError(
                "the model's logits are not finite: its parameters hold NaN or "
                "infinities, or the compute dtype overflows (compute in float32)"
            )
            return self._failed(running.number, error)
        if result.is_done[slot]:
            self._free(running)
        return result.new_tokens(running, slot, self.num_top)

    def _failed(self, number: int, error: Exception) -> NewTokens:
        none, top = np.zeros(0, np.float32), np.zeros((0, self.num_top), np.float32)
        parts = (none.astype(np.int32), none, top.astype(np.int32), top)
        return NewTokens(number, *parts, "error", {}, error=error)

    def _hold(self, number: int, request: Request) -> Running:
        return Running(number, request, self._automata.hold(request))

    def _free(self, running: Running) -> None:
        self._automata.release(running.automata)
        self._slots[self._slots.index(running)] = None

    def _admit(self) -> list[NewTokens]:
        """Fills free slots; returns what has become of requests that cannot run."""
        failed, deferred = [], self._deferred
        # Those whose program is compiled are tried first, and those that had no room.
        is_ready = [future is None or future.done() for _, _, future in deferred]
        pairs = list(zip(deferred, is_ready, strict=True))
        self._deferred = [one for one, ready in pairs if not ready]
        self._waiting.extendleft(one[:2] for one, ready in reversed(pairs) if ready)
        while None in self._slots and self._waiting:
            number, request = self._waiting.popleft()
            try:
                self._take(number, request)
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                failed.append(self._failed(number, error))
        return failed

    def _take(self, number: int, request: Request) -> None:
        """Gives a request a slot, or defers it.

        Raises:
          ValueError, JaxRuntimeError: for a request that cannot be run; no other is
            touched.
        """
        if request.has_automata and any(
            future is None for *_, future in self._deferred
        ):
            # Else many small requests could leave no room for a large one, for ever.
            self._deferred.append((number, request, None))
            return
        try:
            future = self._to_wait_for(request)
        except NoRoom:
            if not self.num_running:
                raise
            self._deferred.append((number, request, None))
            return
        if future is not None:
            self._deferred.append((number, request, future))
            return
        running = self._hold(number, request)
        self._slots[self._slots.index(None)] = running
        self._prompts.add(running)

    def _read(self) -> list[NewTokens]:
        """Reads prompts; returns what has become of those that memory forbids."""
        failed, left = [], self._prompt_tokens
        while read := self._prompts.read(left, self._is_compiled):
            left -= read.num_tokens
            for running in read.requests:
                try:
                    if read.error is not None:
                        raise read.error
                    self._join(running, read.group)
                except jax.errors.JaxRuntimeError as error:
                    self._free(running)
                    failed.append(self._failed(running.number, error))
        return failed

    def _join(self, running: Running, group: Group) -> None:
        """Puts a request whose prompt is read into its slot."""
        assert group.found is not None
        row = group.rows[running.request.tokens.tobytes()]
        own = group.found[0]
        new = self._batch.state_of([running] * len(own.kept), group.found)
        self._batch.put(new, row, self._slots.index(running))
        running.prompt_trace, running.is_read = own.traces[row], True

    @property
    def _has_begun(self) -> bool:
        return any(running and running.length for running in self._slots)

    def _to_wait_for(self, request: Request) -> Future[None] | None:
        """Compiles beside what a request needs; None if it can join now.

        Where no text has begun, nothing is held up: a program is compiled when it is
        first called, unless that has begun before.

        Returns:
          One of the programs that are not compiled yet.
        """
        size, needs = self._automata.size_with(request), {}
        if not self._prompts.has_beginning:
            needs |= self._to_read(self._prompts.size(request.tokens))
        if size > self._automata.size:
            needs |= self._to_decode(size)
        if not self._has_begun:
            for future in self._compiling.unfinished(needs):
                self.clock.wait([future])
                future.result()
            return None
        return next(iter(self._compiling.start(needs)), None)

    def _is_compiled(self, size: ReadSize) -> bool:
        """Whether prompts can be read in this size without waiting for a program."""
        if self._prompts.has_beginning or not self._has_begun:
            return True
        try:
            return not self._compiling.start(self._to_read(size))
        except jax.errors.JaxRuntimeError:  # Memory does not suffice for so many.
            return False

    def _to_read(self, size: ReadSize) -> Needs:
        return to_read(self._models, self._batch, size)

    def _to_decode(self, size: int) -> Needs:
        """Returns what steps with a table of so many states need."""

        def arguments() -> tuple[Any, ...]:
            return self._decoding(self._automata.empty(size), self._steps)

        decode, static = self._programs.decode, {"steps": self._steps}
        return {("steps", size): (decode, arguments, static)}

    def _decoding(self, table: StateTable, limit: int) -> tuple[Any, ...]:
        numbers = np.int32(self.num_tokens), np.int32(limit)
        probes = self._models[0].probes
        return self._split, self._batch.state, table, *numbers, probes, self._proposer

    @property
    def hits(self) -> tuple[Any, ...]:
        """How often each edit has fired."""
        return () if self._batch.state is None else self._batch.state.hits

    def generation_state(self) -> GenerationState:
        """Returns what a later call can go on from.

        The engine cannot be used after it.
        """
        state, spec = self._batch.state, self._programs.spec
        assert state is not None
        history = whole(state.rows.history)
        lengths = np.minimum(history.lengths, self.max_length)
        pairs = zip(history.tokens, lengths, strict=True)
        rows = [row[:length] for row, length in pairs]
        return GenerationState(
            *(self.config, self.params, self.block, spec.kind, self.max_length),
            *(spec.spare, self._split, rows, state.cache),
        )
