"""Prefill: reads prompts into a cache, in chunks of a few sizes."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.infer.decoding.model_programs import Programs
from jaxlm.infer.decoding.prompt_programs import Layers, Probes
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.generation_trace import joined, row_of_chunk
from jaxlm.model.positions import max_fixed_rotation_length
from jaxlm.sharding.processes import whole
from jaxlm.sharding.rules import activation_spec, batch_parts
from jaxlm.types import Params, Trace

SMALLEST_BUCKET = 32
SMALLEST_CAPACITY = 512
# A common beginning of fewer tokens is read in each row: another program costs more.
SHORTEST_COMMON = 64
# Tokens of all rows that are read at once: a bound on the memory of prefill.
PREFILL_TOKENS = 8192

PromptTokens = Int[np.ndarray, " _"]


class CompiledModel(NamedTuple):
    """A model whose programs are compiled when they are first called."""

    programs: Programs
    params: Params
    """Stacked over layers."""
    probes: Probes
    """Edits and taps."""


class Prefilled(NamedTuple):
    """Prompts in a cache."""

    layers: Layers
    logits: Float[Array, "B V"]
    """Of each row's next token."""
    kept: Int[np.ndarray, " B"]
    """Tokens of each row that were in the cache before."""
    hits: tuple[Any, ...]
    """How often each edit has fired."""
    traces: list[Trace]
    """What the taps have read of each row's prompt, on the host."""


class Beginning(NamedTuple):
    """What several prompts begin with."""

    length: int
    """Tokens."""
    found: Prefilled
    """These tokens, in the cache of one row (of one for each part of a mesh)."""


class Reading:
    """Rows of prompts while they are read, one chunk after another."""

    def __init__(
        self,
        model: CompiledModel,
        rows: Sequence[PromptTokens],
        widths: Sequence[int],
        *,
        room: int,
        before: Prefilled | None = None,
        start: Int[np.ndarray, " B"] | None = None,
    ):
        """Reads nothing yet.

        Args:
          widths: tokens of each row in each chunk.
          room: tokens for which a new cache has room.
          before: the cache that the rows go on from; it is overwritten.
          start: tokens of each row that it has; None: 0.
        """
        self._model, self._rows = model, rows
        self._lengths = np.array([len(row) for row in rows], np.int32)
        self._start = np.zeros_like(self._lengths) if start is None else start
        self._widths, self._room = deque(widths), room
        self._found, self._kept = before, np.zeros_like(self._lengths)
        self._hits: tuple[Any, ...] = (0,) * len(model.probes[0])
        self._traces: list[list[Trace]] = [[] for _ in rows]
        if before is not None:
            self._kept, self._hits = before.kept, before.hits
            self._traces = [[trace] for trace in before.traces]

    @property
    def is_done(self) -> bool:
        """Whether all is read."""
        return not self._widths

    def read_chunk(self) -> Prefilled:
        """Reads the next chunk of each row; returns what is read, without traces."""
        programs, params, probes = self._model
        width = self._widths.popleft()
        tokens = np.zeros((len(self._rows), width), np.int32)
        for new, row, first in zip(tokens, self._rows, self._start, strict=True):
            part = row[first : first + width]
            new[: len(part)] = part
        if self._found is None:
            layers, logits, fired, trace = programs.begin(
                *(params, tokens, self._lengths, probes), room=self._room
            )
        else:
            layers, logits, fired, trace = programs.extend(
                *(params, tokens, self._start, self._lengths),
                *(self._found.layers, self._found.logits, probes),
            )
        if probes[1]:
            self._keep(whole(trace), width)
        self._hits = tuple(a + b for a, b in zip(self._hits, fired, strict=True))
        self._start = self._start + np.int32(width)
        self._found = Prefilled(layers, logits, self._kept, self._hits, [])
        return self._found

    def _keep(self, trace: Trace, width: int) -> None:
        taps = self._model.probes[1]
        new = np.clip(self._lengths - self._start, 0, width)
        for row, count in enumerate(new.tolist()):
            self._traces[row].append(row_of_chunk(taps, trace, row, count))

    def finish(self) -> Prefilled:
        """Reads all that is left, and returns the rows."""
        while self._widths:
            self.read_chunk()
        assert self._found is not None
        taps = self._model.probes[1]
        return self._found._replace(traces=[joined(taps, t) for t in self._traces])


def bucket(length: int, largest: int) -> int:
    """`length` rounded up to a power of two from `SMALLEST_BUCKET` to `largest`."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, largest)


def capacity(length: int, largest: int) -> int:
    """Tokens of a cache that has room for `length`: 512, 2,048, 8,192 ... or `largest`.

    There are few sizes, since each compiles its own programs. Room that is not used
    costs memory, but little time (`ops/attention/cached.py`).
    """
    size = SMALLEST_CAPACITY
    while size < length:
        size *= 4
    return min(size, largest)


def chunk_widths(length: int, num_rows: int, max_length: int) -> list[int]:
    """Splits a prompt into chunks: whole ones, and a power of two for the rest."""
    whole = SMALLEST_BUCKET
    while 2 * whole * num_rows <= PREFILL_TOKENS:
        whole *= 2
    widths = [whole] * ((length - 1) // whole)
    done = sum(widths)
    return [*widths, bucket(length - done, max_length - done)]


def prefill(
    model: CompiledModel,
    rows: Sequence[PromptTokens],
    resume: GenerationState | None = None,
) -> Prefilled:
    """Reads prompts whole; what rows share is read once.

    That is: equal rows, and a long beginning that all rows have in common.

    Args:
      resume: what holds a beginning of each row; the rest is read.
    """
    if resume is not None:
        return _resumed(model, rows, resume).finish()
    numbers: dict[bytes, int] = {}
    for row in rows:
        numbers.setdefault(row.tobytes(), len(numbers))
    once = [np.frombuffer(data, np.int32) for data in numbers]
    once += once[:1] * (-len(once) % batch_parts())
    has_all = len(once) >= len(rows)
    once = list(rows) if has_all else once
    found = after(model, once, read_beginning(model, once, len(once))).finish()
    if has_all:
        return found
    places = np.array([numbers[row.tobytes()] for row in rows], np.int32)
    layers, logits = model.programs.take_rows(found.layers, found.logits, places)
    traces = [found.traces[place] for place in places]
    return Prefilled(layers, logits, found.kept[places], found.hits, traces)


def after(
    model: CompiledModel, rows: Sequence[PromptTokens], beginning: Beginning | None
) -> Reading:
    """Returns how rows are read after what they begin with, if that is known."""
    programs, max_length = model.programs, model.programs.spec.max_length
    length = 0 if beginning is None else beginning.length
    rest = max(map(len, rows)) - length
    widths = chunk_widths(rest, len(rows), max_length)
    before = None
    if beginning is not None:
        first, numbers = beginning.found, np.zeros(len(rows), np.int32)
        layers, logits = programs.take_rows(first.layers, first.logits, numbers)
        traces = first.traces[:1] * len(rows)
        before = Prefilled(layers, logits, numbers, first.hits, traces)
    start = np.full(len(rows), length, np.int32)
    return Reading(model, rows, widths, room=max_length, before=before, start=start)


def read_beginning(
    model: CompiledModel, rows: Sequence[PromptTokens], num_rows: int
) -> Beginning | None:
    """Reads a long beginning that all rows have in common; None if there is none.

    Args:
      num_rows: how many of the rows are read at once after it.
    """
    spec = model.programs.spec
    common = _common_length(spec.config, rows, spec.max_length, num_rows)
    if common < SHORTEST_COMMON:
        return None
    start = [rows[0][:common]] * batch_parts()
    return Beginning(common, after(model, start, None).finish())


def _common_length(
    config: ModelConfig,
    rows: Sequence[PromptTokens],
    max_length: int,
    num_rows: int,
) -> int:
    """Returns how many tokens of all rows are read together; 0: none are."""
    # Rows of other lengths may rotate the same keys differently.
    if len(rows) <= batch_parts() or max_fixed_rotation_length(config) is not None:
        return 0
    most = min(map(len, rows)) - 1
    same = np.all([row[:most] == rows[0][:most] for row in rows], axis=0)
    common = most if same.all() else int(same.argmin())
    # The cache must have room for the padding of the rest.
    rest = max(map(len, rows)) - common
    fits = common + sum(chunk_widths(rest, num_rows, max_length)) <= max_length
    return common if fits else 0


def _resumed(
    model: CompiledModel, rows: Sequence[PromptTokens], resume: GenerationState
) -> Reading:
    """Returns how rows are read after what the state holds of them."""
    spec = model.programs.spec
    kept = np.array(resume.shared_lengths(list(rows)), np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    widths = chunk_widths(int((lengths - kept).max()), len(rows), spec.max_length)
    # The cache must have room for the padding too.
    kept = np.minimum(kept, spec.max_length - sum(widths))
    if not kept.any() or not resume.still_held(kept):
        resume.delete()
        return after(model, rows, None)
    layers = resume.cache.layers
    assert isinstance(layers, tuple)
    if resume.max_length < spec.max_length or resume.spare < spec.spare:
        layers = model.programs.grow(layers)
        resume.delete()
    shape, sharding = (len(rows), spec.config.vocab_size), activation_spec("B_")
    logits = jnp.zeros(shape, jnp.float32, out_sharding=sharding)
    hits = (0,) * len(model.probes[0])
    before = Prefilled(layers, logits, kept, hits, [{} for _ in rows])
    return Reading(
        *(model, rows, widths), room=spec.max_length, before=before, start=kept
    )
