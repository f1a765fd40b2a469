"""Beam search: the likeliest texts, found by following several at once.

The cache, the prefill and the step are those of `generate`; between two steps the rows
of the cache change places.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlm.config import CacheKind, ModelConfig
from jaxlm.infer.check_arguments import check_cache, check_count, check_room, row_ids
from jaxlm.infer.decoding.decoding_spec import DecodingSpec
from jaxlm.infer.decoding.model_programs import programs_of
from jaxlm.infer.prefill import CompiledModel, capacity, prefill
from jaxlm.model.block import Block
from jaxlm.model.checks import check_model
from jaxlm.model.kv_cache import Cache
from jaxlm.sharding.rules import batch_parts
from jaxlm.types import Params


class Beam(NamedTuple):
    """A text that was found."""

    tokens: Int[np.ndarray, " n"]
    """New tokens, without the stop token."""
    score: float
    """Sum of the log-probabilities (nats), that of the stop token included, divided by
    their number to the power of the length penalty."""


class _Search:
    """The texts that one prompt is continued by."""

    def __init__(self, num_beams: int, length_penalty: float):
        self.num_beams, self._penalty = num_beams, length_penalty
        self.finished: list[Beam] = []
        # All rows begin alike, so only the first counts at first.
        self.sums = np.full(num_beams, -np.inf)
        self.sums[0] = 0.0
        self.texts: list[list[int]] = [[] for _ in range(num_beams)]
        self.is_done = False

    def step(
        self, logprobs: Float[np.ndarray, "n V"], stop_ids: Sequence[int], is_last: bool
    ) -> list[int]:
        """Chooses the next beams; returns the row that each goes on from."""
        total = self.sums[:, None] + logprobs
        count = min((1 + max(1, len(stop_ids))) * self.num_beams, total.size)
        chosen = np.argsort(-total, axis=None, kind="stable")[:count]
        rows, tokens = np.unravel_index(chosen, total.shape)
        length = len(self.texts[0]) + 1
        running: list[tuple[int, int, float]] = []
        for rank, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            value, ends = float(total[row, token]), int(token) in stop_ids
            text = [*self.texts[row], *([] if ends else [int(token)])]
            if not (ends or is_last):
                running.append((int(row), int(token), value))
            elif rank < self.num_beams and np.isfinite(value):
                found = np.array(text, np.int32)
                self.finished.append(Beam(found, value / length**self._penalty))
        best = sorted(self.finished, key=lambda beam: -beam.score)
        self.finished = best[: self.num_beams]
        running = running[: self.num_beams]
        if is_last or len(running) < self.num_beams:
            self.is_done = True
            return list(range(self.num_beams))
        self.texts = [[*self.texts[row], token] for row, token, _ in running]
        self.sums = np.array([value for _, _, value in running])
        is_full = len(self.finished) == self.num_beams
        possible = self.sums[0] / length**self._penalty
        self.is_done = is_full and possible <= self.finished[-1].score
        return [row for row, _, _ in running]


def beam_search(
    config: ModelConfig,
    params: Params,
    prompts: Any,
    *,
    num_beams: int = 4,
    max_new_tokens: int = 256,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    num_tokens: int | None = None,
    cache: CacheKind = "full",
    block: type[Block] = Block,
) -> list[list[Beam]]:
    """Searches the likeliest continuations of each prompt.

    In each step the likeliest `num_beams` continuations of the beams go on. One that
    ends is kept. The search ends when no beam, as it is, has a better score than the
    worst of `num_beams` texts that have ended, as in transformers (with
    `early_stopping=False`), whose results these are.

    Args:
      params, prompts, num_tokens, cache, block: as for `generate`.
      length_penalty: above 0 favors long texts, below 0 short ones.
      stop_ids: tokens that end a text.

    Returns:
      For each prompt its `num_beams` best texts, the best first.

    Raises:
      ValueError: for arguments that `generate` would refuse, a mesh of several batch
        shards, and logits that are not finite.
    """
    check_model(config, params, block)
    num_tokens = config.vocab_size if num_tokens is None else num_tokens
    check_count("num_tokens", num_tokens, 1, config.vocab_size)
    check_count("num_beams", num_beams, 1, num_tokens)
    if batch_parts() > 1:
        raise ValueError("beam_search runs on one batch shard: take mesh.data 1")
    rows = row_ids(prompts, num_tokens)
    for i, row in enumerate(rows):
        check_room(f"prompt {i}", row, max_new_tokens, config.context_length)
    most = max(map(len, rows)) + max_new_tokens
    max_length = capacity(most, config.context_length)
    repeated = [row for row in rows for _ in range(num_beams)]
    check_cache(config, params, len(repeated), max_length, cache)
    spec = DecodingSpec(config, max_length, cache, block=block)
    programs = programs_of(spec.for_rows(len(repeated)))
    split, none = programs.split(params), ((), ())
    found = prefill(CompiledModel(programs, params, none), repeated)
    layers, logits = found.layers, found.logits
    lengths = np.array([len(row) for row in repeated], np.int32)
    searches = [_Search(num_beams, length_penalty) for _ in rows]
    for step in range(1, max_new_tokens + 1):
        logprobs = _log_softmax(np.asarray(logits)[:, :num_tokens])
        if not np.isfinite(logprobs).any(axis=1).all():
            raise ValueError("the model's logits are not finite: compute in float32")
        places = np.arange(len(repeated), dtype=np.int32)
        tokens = np.zeros(len(repeated), np.int32)
        for i, search in enumerate(searches):
            own = slice(i * num_beams, (i + 1) * num_beams)
            if not search.is_done:
                parents = search.step(logprobs[own], stop_ids, step == max_new_tokens)
                places[own] = i * num_beams + np.array(parents)
            if not search.is_done:
                tokens[own] = [text[-1] for text in search.texts]
        if all(search.is_done for search in searches):
            break
        layers, _ = programs.take_rows(layers, logits, places)
        (placed,) = programs.place((lengths,))
        new, logits, _, _ = programs.advance(split, Cache(layers, placed), tokens, none)
        layers, lengths = new.layers, lengths + np.int32(1)
    return [search.finished for search in searches]


def _log_softmax(logits: Float[np.ndarray, "R V"]) -> Float[np.ndarray, "R V"]:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
