"""Prefill: reads prompts into a cache, in chunks of a few sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config import ModelConfig
from jaxlm.infer.decoding import Programs
from jaxlm.infer.generation_state import GenerationState
from jaxlm.infer.generation_trace import joined, row_of_chunk
from jaxlm.model.kv_cache import LayerCache
from jaxlm.model.positions import max_fixed_rotation_length
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.processes import whole
from jaxlm.sharding.rules import activation_spec, batch_parts
from jaxlm.types import Params, Trace

SMALLEST_BUCKET = 32
SMALLEST_CAPACITY = 512
# A common beginning of fewer tokens is read in each row: another program costs more.
SHORTEST_COMMON = 64
# Tokens of all rows that are read at once: a bound on the memory of prefill.
PREFILL_TOKENS = 8192


class Prefilled(NamedTuple):
    """Prompts in a cache."""

    layers: tuple[LayerCache, ...]
    logits: Float[Array, "B V"]
    """Of each row's next token."""
    kept: Int[np.ndarray, " B"]
    """Tokens of each row that were in the cache before."""
    hits: tuple[Any, ...]
    """How often each edit has fired."""
    traces: list[Trace]
    """What the taps have read of each row's prompt, on the host."""


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


def prefill(
    config: ModelConfig,
    programs: Programs,
    params: Params,
    rows: list[Int[np.ndarray, " _"]],
    max_length: int,
    probes: tuple[Sequence[Edit], Sequence[Tap]],
    resume: GenerationState | None = None,
    spare: int = 0,
) -> Prefilled:
    """Reads what the cache of `resume` lacks; what rows share is read once.

    That is: equal rows, and a long beginning that all rows have in common.

    Args:
      probes: edits and taps.
      spare: room of the cache beyond `max_length`.
    """
    numbers: dict[bytes, int] = {}
    for row in rows:
        numbers.setdefault(row.tobytes(), len(numbers))
    once = [np.frombuffer(data, np.int32) for data in numbers]
    once += once[:1] * (-len(once) % batch_parts())
    if resume is not None:
        return _prefill(
            *(config, programs, params, rows, max_length, probes, resume, spare)
        )
    has_all = len(once) >= len(rows)
    once, beginning = rows if has_all else once, None
    if (common := _common_length(config, once, max_length)) >= SHORTEST_COMMON:
        start = [once[0][:common]] * batch_parts()
        beginning = (
            common,
            _prefill(
                *(config, programs, params, start, max_length, probes, None, spare)
            ),
        )
    found = _prefill(
        *(config, programs, params, once, max_length, probes, None, spare),
        beginning=beginning,
    )
    if has_all:
        return found
    places = np.array([numbers[row.tobytes()] for row in rows], np.int32)
    layers, logits = programs.repeat(found.layers, found.logits, places)
    traces = [found.traces[place] for place in places]
    return Prefilled(layers, logits, found.kept[places], found.hits, traces)


def _prefill(
    config: ModelConfig,
    programs: Programs,
    params: Params,
    rows: list[Int[np.ndarray, " _"]],
    max_length: int,
    probes: tuple[Sequence[Edit], Sequence[Tap]],
    resume: GenerationState | None,
    spare: int,
    beginning: tuple[int, Prefilled] | None = None,
) -> Prefilled:
    """Reads rows.

    Args:
      beginning: so many tokens that all rows begin with, in a cache of their own.
    """
    edits, taps = probes
    lengths = np.array([len(row) for row in rows], np.int32)
    kept = np.zeros_like(lengths)
    if beginning is not None:
        kept += beginning[0]
    if resume is not None:
        kept = np.array(resume.shared_lengths(rows), np.int32)
    widths = chunk_widths(int((lengths - kept).max()), len(rows), max_length)
    # The cache must have room for the padding too.
    kept = np.minimum(kept, max_length - sum(widths))
    if resume is not None and not resume.still_held(kept):
        kept = np.zeros_like(lengths)
        widths = chunk_widths(int(lengths.max()), len(rows), max_length)
    layers: Any = None
    logits: Any = None
    if resume is not None and kept.any():
        layers = resume.cache.layers
        shape, sharding = (len(rows), config.vocab_size), activation_spec("B_")
        logits = jnp.zeros(shape, jnp.float32, out_sharding=sharding)
        if resume.max_length < max_length or resume.spare < spare:
            layers = programs.grow(layers)
    if resume is not None and layers is not resume.cache.layers:
        resume.delete()
    start, hits = kept, (0,) * len(edits)
    parts: list[list[Trace]] = [[] for _ in rows]
    if beginning is not None:
        _, first = beginning
        numbers = np.zeros(len(rows), np.int32)
        layers, logits = programs.repeat(first.layers, first.logits, numbers)
        hits = first.hits
        parts = [[first.traces[0]] for _ in rows]
        kept = np.zeros_like(lengths)
    for width in widths:
        tokens = np.zeros((len(rows), width), np.int32)
        for new, row, first in zip(tokens, rows, start, strict=True):
            part = row[first : first + width]
            new[: len(part)] = part
        if layers is None:
            layers, logits, fired, trace = programs.begin(
                *(params, tokens, lengths, probes)
            )
        else:
            layers, logits, fired, trace = programs.extend(
                *(params, tokens, start, lengths, layers, logits, probes)
            )
        if taps:
            trace = whole(trace)
            new = np.clip(lengths - start, 0, width)
            for row, count in enumerate(new.tolist()):
                parts[row].append(row_of_chunk(taps, trace, row, count))
        hits = tuple(a + b for a, b in zip(hits, fired, strict=True))
        start = start + np.int32(width)
    traces = [joined(taps, part) for part in parts]
    return Prefilled(layers, logits, kept, hits, traces)


def _common_length(
    config: ModelConfig, rows: list[Int[np.ndarray, " _"]], max_length: int
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
    fits = common + sum(chunk_widths(rest, len(rows), max_length)) <= max_length
    return common if fits else 0


def chunk_widths(length: int, num_rows: int, max_length: int) -> list[int]:
    """Splits a prompt into chunks: whole ones, and a power of two for the rest."""
    whole = SMALLEST_BUCKET
    while 2 * whole * num_rows <= PREFILL_TOKENS:
        whole *= 2
    widths = [whole] * ((length - 1) // whole)
    done = sum(widths)
    return [*widths, bucket(length - done, max_length - done)]
