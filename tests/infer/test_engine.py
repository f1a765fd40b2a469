"""Slots: rows of a batch that join and leave equal the same prompts alone."""

import contextlib
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.config import SampleConfig
from jaxlm.infer.decoding.decoding_spec import DecodingSpec
from jaxlm.infer.decoding.model_programs import programs_of
from jaxlm.infer.decoding.timed_program import TimedProgram
from jaxlm.infer.generate import generate
from jaxlm.infer.prefill import Reading
from jaxlm.infer.rules.automata import ENDS, FORBIDDEN, Automaton
from jaxlm.infer.slots.clock import Clock
from jaxlm.infer.slots.engine import Engine
from jaxlm.infer.slots.prompt_reader import Group
from jaxlm.infer.slots.slot_request import Request

CONFIG = toy()
PARAMS = make_params(CONFIG, std=0.5)
LETTERS = [chr(97 + i % 26).encode() * (1 + i // 26) for i in range(CONFIG.vocab_size)]
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 48, n).tolist() for n in (1, 40, 32, 3, 20, 9, 7, 2, 5)]
# Of uneven length and of all kinds.
SAMPLES = [
    SampleConfig(temperature=0.0, max_new_tokens=20),
    SampleConfig(max_new_tokens=5),
    SampleConfig(max_new_tokens=33, top_k=5),
    SampleConfig(temperature=0.0, max_new_tokens=40, stop_ids=(3, 4, 5)),
    SampleConfig(max_new_tokens=40, stop_strings=("a", "zz")),
    SampleConfig(max_new_tokens=1),
    SampleConfig(temperature=0.5, max_new_tokens=17, repetition_penalty=1.3),
    SampleConfig(max_new_tokens=40, stop_strings=("bb", "x")),
    SampleConfig(temperature=0.0, max_new_tokens=16),
]
# The logits reach 15, and caches of other lengths sum in another order.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KEYS = jax.random.split(jax.random.key(5), len(PROMPTS))


@pytest.fixture(scope="module")
def alone():
    """Each request by itself."""
    return [
        generate(
            *(CONFIG, PARAMS, [prompt], sample, KEYS[i : i + 1]),
            token_bytes=LETTERS,
            top_logprobs=2,
        )
        for i, (prompt, sample) in enumerate(zip(PROMPTS, SAMPLES, strict=True))
    ]


def request(i, grammar=None):
    return Request(np.array(PROMPTS[i], np.int32), SAMPLES[i], KEYS[i], grammar)


def programs(names):
    """Those of the engine among the names of programs, without single operations."""
    own = {f"jit({name})" for name in ("begin", "extend", "insert", "decode")}
    return [name for name in names if name in own]


def assert_same(alone, parts):
    """Tokens are equal; log-probabilities to the rounding of sums in f32."""
    (row,) = alone.rows
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts]), row)
    for name in ("logprobs", "top_logprobs"):
        ours = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_allclose(ours, getattr(alone, name)[0, : len(row)], **CLOSE)
    assert [part.ended for part in parts[:-1]] == [None] * (len(parts) - 1)


@pytest.mark.slow
def test_rows_that_join_and_leave_are_what_they_are_alone(
    alone, compilations, monkeypatch
):
    """The first two are read together, since their prompts are of one size."""
    read_chunk, num_read = Group.read_chunk, []

    def read(self):
        num_read.append(len(self.rows))
        read_chunk(self)

    monkeypatch.setattr(Group, "read_chunk", read)
    engine = Engine(
        *(CONFIG, PARAMS),
        num_slots=2,
        token_bytes=LETTERS,
        top_logprobs=2,
    )
    engine.compile()
    order, numbers = [0, 2, 1, *range(3, len(PROMPTS))], {}
    for i in order[:3]:
        numbers[engine.submit(request(i))] = i
    parts, left, first_compiled = {}, order[3:], None
    while not engine.is_idle:
        for part in engine.step():
            parts.setdefault(numbers[part.number], []).append(part)
            if part.ended and left:
                i = left.pop(0)
                numbers[engine.submit(request(i))] = i
        assert engine.num_running <= 2
        if first_compiled is None and len(parts) >= 4 and 1 in parts:
            first_compiled = programs(compilations)
    # Others are too where they come together; when they do depends on the compiler.
    assert num_read[0] == 2 and sum(num_read) == len(PROMPTS)
    for i, result in enumerate(alone):
        assert_same(result, parts[i])
        is_full = result.lengths[0] == SAMPLES[i].max_new_tokens
        assert parts[i][-1].ended == ("length" if is_full else "stop")
    assert {part[-1].ended for part in parts.values()} == {"length", "stop"}
    # By then prompts of both sizes had come, and slots had been used again.
    assert programs(compilations) == first_compiled


def test_a_long_prompt_is_read_between_the_steps_of_others(
    alone, compilations, monkeypatch
):
    """Of 40 tokens, 16 at a time; one of 1 token that comes later begins before it."""
    read_chunk, num_read = Reading.read_chunk, []

    def read(self):
        num_read[-1] += self._widths[0] * len(self._rows)
        return read_chunk(self)

    monkeypatch.setattr(Reading, "read_chunk", read)
    engine = Engine(
        *(CONFIG, PARAMS),
        num_slots=2,
        token_bytes=LETTERS,
        top_logprobs=2,
        prompt_tokens=16,
    )
    long, short = (engine.submit(request(i)) for i in (1, 0))
    parts, new = {long: [], short: []}, []
    while not parts[long]:
        num_read.append(0)
        found = engine.step()
        for part in found:
            parts[part.number].append(part)
        new.append({part.number: len(part.tokens) for part in found})
    assert num_read == [16] * 4
    assert new == [{}, {short: 8}, {short: 8}, {long: 5, short: 4}]
    # Another length compiles none of the engine's programs again.
    compilations.clear()
    num_read.append(0)
    other = engine.submit(request(4))
    while not engine.is_idle:
        for part in engine.step():
            parts.setdefault(part.number, []).append(part)
    assert programs(compilations) == [] and num_read[-1] == 32
    for number, i in ((long, 1), (short, 0), (other, 4)):
        assert_same(alone[i], parts[number])


def test_a_canceled_request_leaves_the_others_as_they_are(alone):
    engine = Engine(CONFIG, PARAMS, num_slots=2, token_bytes=LETTERS, top_logprobs=2)
    numbers = [engine.submit(request(i)) for i in (0, 2, 3, 8)]
    parts = {number: [] for number in numbers}
    steps = 0
    while not engine.is_idle:
        for part in engine.step():
            parts[part.number].append(part)
        steps += 1
        if steps == 1:
            # One runs, and one waits.
            engine.cancel(numbers[1])
            engine.cancel(numbers[2])
            assert (engine.num_running, engine.num_waiting) == (1, 1)
    assert_same(alone[0], parts[numbers[0]])
    assert_same(alone[8], parts[numbers[3]])
    assert len(parts[numbers[1]]) == 1 and not parts[numbers[2]]


@pytest.mark.slow
def test_more_prompts_than_slots_come_back_in_order(alone, monkeypatch):
    seen, shown = np.zeros(len(PROMPTS), int), []

    @contextlib.contextmanager
    def progress_bar(title, total, unit):
        assert total and unit == "texts"
        yield shown.append

    monkeypatch.setattr("jaxlm.infer.generate.progress_bar", progress_bar)

    def count(new, inside):
        assert new.shape == inside.shape and len(new) == len(PROMPTS)
        seen[:] += inside.sum(axis=1)

    call = (CONFIG, PARAMS, PROMPTS, SAMPLES, KEYS)
    options = {"num_slots": 2, "top_logprobs": 2}
    result = generate(*call, token_bytes=LETTERS, on_tokens=count, **options)
    for i, single in enumerate(alone):
        np.testing.assert_array_equal(result.rows[i], single.rows[0])
        ours = result.logprobs[i, : result.lengths[i]]
        np.testing.assert_allclose(ours, single.logprobs[0, : len(ours)], **CLOSE)
    np.testing.assert_array_equal(seen, result.lengths)
    assert shown == sorted(shown) and shown[0] < shown[-1] == len(PROMPTS)
    # Where none waits, there is no bar.
    shown.clear()
    generate(CONFIG, PARAMS, PROMPTS[:1], SAMPLES[5])
    assert shown == []


@pytest.mark.slow
def test_keys_are_given_for_all_rows_or_for_each():
    call = (CONFIG, PARAMS, PROMPTS[:3], SAMPLES[2])
    one = generate(*call, jax.random.key(3))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(np.arange(3))
    for same in (3, keys):
        np.testing.assert_array_equal(generate(*call, same).tokens, one.tokens)
    # A row keeps its text at another place in the batch.
    turned = generate(CONFIG, PARAMS, PROMPTS[2::-1], SAMPLES[2], keys[::-1])
    np.testing.assert_array_equal(turned.tokens[::-1], one.tokens)


def test_grammars_hold_for_their_rows_only(compilations):
    """One row writes (4 5)*, one ends itself after 7 8, and one is free."""
    pairs = np.full((2, 48), FORBIDDEN, np.int16)
    pairs[0, 4], pairs[1, 5], pairs[0, 0] = 1, 0, 0
    ends = np.full((2, 48), FORBIDDEN, np.int16)
    ends[0, 7], ends[1, 8] = 1, ENDS
    sample = SampleConfig(max_new_tokens=20, stop_ids=(0,))
    call = (CONFIG, PARAMS, PROMPTS[:3], sample, 3)
    free = generate(*call)
    before = list(compilations)
    pairs = Automaton(pairs, np.array([0, 1], np.int16))
    ends = Automaton(ends, np.array([2, 1], np.int16))
    result = generate(*call, grammars=[pairs, ends, None])
    assert compilations == before
    tokens = result.rows[0].tolist()
    assert tokens == [4, 5] * (len(tokens) // 2) and len(tokens) in (
        *range(0, 20, 2),
        20,
    )
    assert result.rows[1].tolist() == [7, 8]
    np.testing.assert_array_equal(result.rows[2], free.rows[2])
    for wrong, message in (
        (
            [pairs._replace(needs=pairs.needs + 21), None, None],
            "has 21 tokens, more than max_new_tokens 20: raise it",
        ),
        ([pairs], "grammars has 1 entries for 3 prompts"),
        (
            [pairs._replace(transitions=pairs[0][:, :40]), None, None],
            r"shape \(2, 40\) and dtype int16: give a table",
        ),
        (
            [pairs._replace(transitions=pairs[0] + 2), None, None],
            "leads to states outside -2 to 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*call, grammars=[*wrong])


def test_a_request_that_cannot_be_is_refused_when_it_comes():
    engine = Engine(CONFIG, PARAMS, num_slots=2, max_length=50)
    for prompt, sample, message in (
        ([], SAMPLES[0], "prompt 0 is empty"),
        ([48], SAMPLES[0], "has the id 48"),
        ([1] * 40, SAMPLES[0], "40 tokens, with 20 new ones 60: more than the context"),
        ([1], SAMPLES[4], "needs the text of the tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(Request(np.array(prompt, np.int32), sample, KEYS[0]))
    assert engine.is_idle and engine.step() == []


def test_what_fails_for_one_request_fails_it_alone(alone, monkeypatch):
    """A prompt that memory does not suffice for, and logits that are not finite."""
    engine = Engine(CONFIG, PARAMS, num_slots=2, token_bytes=LETTERS, top_logprobs=2)
    read_chunk = Group.read_chunk

    def read(self):
        read_chunk(self)
        lengths = [len(data) // 4 for data in self.rows]
        if 9 in lengths:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        if 40 in lengths:
            # Of its keys and values too: the next text in the slot, whose prompt takes
            # less room, sees none of them.
            self.found = jax.tree.map(lambda x: x * np.nan, self.found)

    monkeypatch.setattr(Group, "read_chunk", read)
    too_long = SampleConfig(max_new_tokens=9, stop_strings=("a" * 40_000,))
    order = [0, 1, 5, 8, 2]
    requests = [request(i) for i in order]
    requests.insert(2, Request(requests[0].tokens, too_long, KEYS[0]))
    numbers = [engine.submit(one) for one in requests]
    parts = {number: [] for number in numbers}
    while not engine.is_idle:
        for part in engine.step():
            parts[part.number].append(part)
    for number, expected in ((1, "not finite"), (2, "too long"), (3, "RESOURCE")):
        (part,) = parts[number]
        assert part.ended == "error" and expected in str(part.error)
    for number, i in ((0, 0), (4, 8), (5, 2)):
        assert_same(alone[i], parts[number])


@pytest.mark.slow
def test_a_larger_table_compiles_beside_and_a_full_one_is_waited_for(
    alone, monkeypatch
):
    engine = Engine(CONFIG, PARAMS, num_slots=2, token_bytes=LETTERS, top_logprobs=2)
    futures, compile_beside = [], TimedProgram.compile_beside

    def held_back(self, *arguments, **static):
        if self is engine._programs.decode:
            futures.append(compile_beside(self, *arguments, **static))
            futures.append(Future())
            return futures[-1]
        return None

    monkeypatch.setattr(TimedProgram, "compile_beside", held_back)
    loop = Automaton(np.zeros((20, 48), np.int16), np.zeros(20, np.int16))
    first = engine.submit(request(0))
    assert engine.step()[0].number == first
    larger = engine.submit(request(8, loop))
    other = engine.submit(request(2))
    numbers = [part.number for _ in range(2) for part in engine.step()]
    # The one that came later runs meanwhile.
    assert set(numbers) == {first, other} and engine.num_waiting == 1
    futures[0].result()
    futures[1].set_result(None)
    before = engine._programs.decode.compile_s
    parts = engine.step()
    assert larger in [part.number for part in parts]
    assert engine._programs.decode.compile_s == before
    # No room for this one while another holds its own.
    full = Automaton(np.zeros((32_760, 48), np.int16), np.zeros(32_760, np.int16))
    monkeypatch.setattr(TimedProgram, "compile_beside", lambda *_, **static: None)
    engine.cancel(other)
    large = engine.submit(request(8, full))
    later = engine.submit(request(4))
    while not engine.is_idle:
        parts += engine.step()
    assert_same(alone[8], [p for p in parts if p.number == larger])
    assert_same(alone[4], [p for p in parts if p.number == later])
    assert all(part.error is None for part in parts)
    # A small one that came later did not take its room.
    order = [part.number for part in parts]
    assert order.index(large) < order.index(later)


def test_an_engine_whose_requests_all_wait_for_programs_waits_too(monkeypatch):
    """It would keep a core busy, which the compiler needs."""
    engine = Engine(CONFIG, PARAMS, num_slots=2, token_bytes=LETTERS, top_logprobs=2)
    first = engine.submit(request(0))
    engine.step()
    program = Future()
    monkeypatch.setattr(TimedProgram, "compile_beside", lambda *_, **static: program)
    second = engine.submit(request(1))
    engine.step()
    engine.cancel(first)
    waits = []

    def wait(futures, seconds):
        waits.append((set(futures), seconds < 1))
        if len(waits) == 2:
            program.set_result(None)

    monkeypatch.setattr(engine.clock, "wait", wait)
    monkeypatch.setattr(engine, "_read", list)
    engine.step()
    assert engine.num_waiting == 1
    engine.step()
    assert waits == [({program}, True)] * 2
    assert [running.number for running in engine._slots if running] == [second]


def test_waiting_for_a_program_counts_as_compiling():
    start = time.perf_counter()
    clock = Clock(programs_of(DecodingSpec(CONFIG, 8)))
    clock.wait([Future()], 0.05)
    assert clock.compile_s > 0.04
    assert clock.lap() <= time.perf_counter() - start - clock.compile_s
