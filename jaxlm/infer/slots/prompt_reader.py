"""Which prompts are read next, and how many tokens of them.

Prompts of up to `budget` tokens are read at once, a few of one size together. A longer
one is read in chunks of as many tokens, into a cache of its own; shorter ones that wait
are read in turns with it, and no other long one begins before it is done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.infer.prefill import (
    Beginning,
    CompiledModel,
    Prefilled,
    PromptTokens,
    Reading,
    after,
    bucket,
    capacity,
    chunk_widths,
    read_beginning,
)
from jaxlm.infer.slots.slot_request import Running
from jaxlm.sharding.rules import batch_parts

# Prompts that are read together: on a CPU four of 32 tokens take twice as long as one.
TOGETHER = 4


@dataclass(frozen=True)
class ReadSize:
    """The shapes in which prompts are read: each is compiled once."""

    num_rows: int
    widths: tuple[int, ...]
    """Of the chunks."""
    room: int
    """Tokens for which the cache of the prompts has room."""

    @property
    def num_tokens(self) -> int:
        """Of all rows in the first chunk, padding included: no other has more."""
        return self.num_rows * self.widths[0]


class Group:
    """Prompts that are read together."""

    def __init__(self, prompts: Sequence[PromptTokens], readings: Sequence[Reading]):
        """Reads nothing yet.

        Args:
          prompts: the first rows of `readings`, all of them different.
          readings: by the model and its draft model.
        """
        self.rows = {tokens.tobytes(): row for row, tokens in enumerate(prompts)}
        """The row of each prompt, by its tokens."""
        self.found: list[Prefilled] | None = None
        """By each model; None until all is read."""
        self._readings = readings

    def read_chunk(self) -> None:
        """Reads the next chunk, by all models."""
        jax.block_until_ready([reading.read_chunk() for reading in self._readings])
        if self._readings[0].is_done:
            self.found = [reading.finish() for reading in self._readings]


class ReadResult(NamedTuple):
    """What has been read at once."""

    requests: list[Running]
    """Those whose prompts have been read now, or never will be."""
    group: Group
    num_tokens: int
    """That were read, padding included."""
    error: Exception | None = None
    """Why they will not be: memory does not suffice."""


class PromptReader:
    """Reads the prompts of requests that have a slot."""

    def __init__(self, models: Sequence[CompiledModel], num_slots: int, budget: int):
        """Prepares to read.

        Args:
          models: the model and its draft model, if there is one.
          num_slots: at most so many prompts are read together.
          budget: tokens that are read at once, padding included.
        """
        self._models, self._budget = models, budget
        self._max_length = models[0].programs.spec.max_length
        self._beginnings: list[Beginning | None] = [None] * len(models)
        # How many prompts are read together; 1 from the first time on that memory did
        # not suffice for more.
        self._most = min(TOGETHER, num_slots)
        self._waiting: list[Running] = []
        self._long: Group | None = None
        self._last: Group | None = None
        self._was_long = False

    @property
    def has_beginning(self) -> bool:
        """Whether prompts go on from a beginning that was read before."""
        return any(self._beginnings)

    def share_beginning(self, rows: list[PromptTokens]) -> None:
        """Reads a long beginning of all rows, which later ones have too."""
        found = [read_beginning(r, rows, batch_parts()) for r in self._models]
        self._beginnings = jax.block_until_ready(found)

    def add(self, running: Running) -> None:
        """Queues the prompt of a request."""
        self._waiting.append(running)

    def drop(self, running: Running) -> None:
        """Takes a request back, if it waits."""
        if running in self._waiting:
            self._waiting.remove(running)
        if self._long is not None and not self._of(self._long):
            self._long = None

    def read(
        self, left: int, is_ready: Callable[[ReadSize], bool]
    ) -> ReadResult | None:
        """Reads prompts of one size, or a chunk of a long one.

        Args:
          left: how many tokens of `budget` are left in this step.
          is_ready: whether several prompts can be read together in this size.

        Returns:
          What has been read; None if nothing waits, or what comes next takes more
          than is left.
        """
        chosen = self._next(left, is_ready)
        if chosen is None:
            return None
        group, cost = chosen
        try:
            if group.found is None:
                group.read_chunk()
        except jax.errors.JaxRuntimeError as error:
            if len(group.rows) > 1:
                # Memory may suffice for one.
                self._most = 1
                return ReadResult([], group, cost)
            return ReadResult(self._end(group), group, cost, error)
        if group.found is None:
            return ReadResult([], group, cost)
        self._last = group
        return ReadResult(self._end(group), group, cost)

    def _end(self, group: Group) -> list[Running]:
        """Takes the requests that wait for these prompts out of the queue."""
        done = self._of(group)
        self._waiting = [one for one in self._waiting if one not in done]
        if group is self._long:
            self._long = None
        return done

    def _of(self, group: Group) -> list[Running]:
        return [r for r in self._waiting if r.request.tokens.tobytes() in group.rows]

    def _next(
        self, left: int, is_ready: Callable[[ReadSize], bool]
    ) -> tuple[Group, int] | None:
        """Returns what to read next, and how many tokens of it; None: see `read`."""
        if not self._waiting:
            return None
        if self._last is not None and self._of(self._last):
            return self._last, 0
        sized = [(self.size(one.request.tokens), one) for one in self._waiting]
        short = [pair for pair in sized if len(pair[0].widths) == 1]
        long = [pair for pair in sized if len(pair[0].widths) > 1]
        takes_long = bool(long) and not (short and self._was_long)
        size, first = (long if takes_long else short)[0]
        # What takes more than the budget is read alone, at the start of a step.
        if size.num_tokens > left and left < self._budget:
            return None
        self._was_long = takes_long
        if not takes_long:
            alike = [one.request.tokens for other, one in short if other == size]
            return self._together(alike, left, is_ready)
        if self._long is None:
            self._long = self._group([first.request.tokens], size)
        return self._long, size.num_tokens

    def _together(
        self,
        prompts: list[PromptTokens],
        left: int,
        is_ready: Callable[[ReadSize], bool],
    ) -> tuple[Group, int]:
        """Takes as many of these prompts, all of one size, as can be read at once."""
        prompts = list({tokens.tobytes(): tokens for tokens in prompts}.values())
        count = min(len(prompts), self._most)
        size = self.size(prompts[0], count)
        while count > 1 and (size.num_tokens > left or not is_ready(size)):
            count -= 1
            size = self.size(prompts[0], count)
        return self._group(prompts[:count], size), size.num_tokens

    def _group(self, prompts: list[PromptTokens], size: ReadSize) -> Group:
        rows = prompts + prompts[:1] * (size.num_rows - len(prompts))
        pairs = zip(self._models, self._beginnings, strict=True)
        if self.has_beginning:
            return Group(prompts, [after(model, rows, b) for model, b in pairs])
        size_of_all = {"widths": size.widths, "room": size.room}
        readings = [Reading(model, rows, **size_of_all) for model, _ in pairs]
        return Group(prompts, readings)

    def size(self, tokens: PromptTokens, num_prompts: int = 1) -> ReadSize:
        """Returns the size in which so many prompts like this one are read."""
        num_rows = 1 << (num_prompts - 1).bit_length()
        num_rows += -num_rows % batch_parts()
        length, beginning = len(tokens), self._beginnings[0]
        if beginning is not None:
            rest = length - beginning.length
            widths = chunk_widths(rest, num_rows, self._max_length)
            return ReadSize(num_rows, tuple(widths), self._max_length)
        if length <= self._budget:
            width = bucket(length, min(self._budget, self._max_length))
            return ReadSize(num_rows, (width,), width)
        room = capacity(length, self._max_length)
        starts = range(0, length, self._budget)
        widths = tuple(min(self._budget, room - start) for start in starts)
        return ReadSize(num_rows, widths, room)

    def short_sizes(self) -> list[ReadSize]:
        """Returns all sizes in which prompts are read at once, the smallest first."""
        largest = min(self._budget, self._max_length)
        widths, sizes = [bucket(1, largest)], []
        while widths[-1] < largest:
            widths.append(bucket(widths[-1] + 1, largest))
        for width in widths:
            tokens = np.zeros(width, np.int32)
            for count in range(1, self._most + 1):
                size = self.size(tokens, count)
                if count == 1 or size.num_tokens <= self._budget:
                    sizes.append(size)
        return list(dict.fromkeys(sizes))
