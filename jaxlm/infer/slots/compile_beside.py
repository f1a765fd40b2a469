"""What is compiled beside texts that are being written."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from jaxlm.infer.decoding.timed_program import TimedProgram
from jaxlm.infer.prefill import CompiledModel
from jaxlm.infer.slots.prompt_reader import ReadSize
from jaxlm.infer.slots.slot_batch import SlotBatch, nothing_read

# A program, what makes its arguments, and the static ones; each under a name.
Needs = dict[Any, tuple[TimedProgram, Callable[[], tuple[Any, ...]], dict[str, int]]]


class CompileBeside:
    """Compiles programs in threads, each once."""

    def __init__(self):
        """Starts nothing."""
        self._started: dict[Any, Future[None] | None] = {}

    def start(self, needs: Needs) -> list[Future[None]]:
        """Starts what has not been; returns what is not done."""
        for name, (program, arguments, static) in needs.items():
            if name not in self._started:
                self._started[name] = program.compile_beside(*arguments(), **static)
        return self.unfinished(needs)

    def unfinished(self, needs: Needs) -> list[Future[None]]:
        """Returns what was started and is not done.

        Raises:
          Exception: what has failed to compile.
        """
        futures = [f for name in needs if (f := self._started.get(name)) is not None]
        for future in futures:
            if future.done():
                future.result()
        return [future for future in futures if not future.done()]


def to_read(models: list[CompiledModel], batch: SlotBatch, size: ReadSize) -> Needs:
    """Returns what reading prompts of a size needs, and putting them into slots."""
    num_rows, widths, room = size.num_rows, size.widths, size.room
    lengths = np.zeros(num_rows, np.int32)

    def beginning(model: CompiledModel) -> tuple[Any, ...]:
        tokens = np.zeros((num_rows, widths[0]), np.int32)
        return model.params, tokens, lengths, model.probes

    def extending(model: CompiledModel, width: int) -> tuple[Any, ...]:
        tokens = np.zeros((num_rows, width), np.int32)
        empty = nothing_read(model, num_rows, room)
        read = (empty.layers, empty.logits)
        return model.params, tokens, lengths, lengths, *read, model.probes

    def joining() -> tuple[Any, ...]:
        at = (np.int32(0), np.int32(0))
        return batch.make(), batch.empty(num_rows, room), *at

    insert = models[0].programs.insert
    needs: Needs = {("join", num_rows, room): (insert, joining, {})}
    for i, model in enumerate(models):
        begin, extend = model.programs.begin, model.programs.extend
        name = ("begin", i, num_rows, widths[0], room)
        needs[name] = (begin, partial(beginning, model), {"room": room})
        for width in set(widths[1:]):
            name = ("extend", i, num_rows, width, room)
            needs[name] = (extend, partial(extending, model, width), {})
    return needs
