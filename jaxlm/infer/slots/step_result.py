"""What a step has drawn for all slots, and what it adds to the text of each."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from jaxlm.infer.decoding.decode_state import Drawn, Rows
from jaxlm.infer.generation_trace import joined, row_of_steps
from jaxlm.infer.rules.automata import ENDED
from jaxlm.infer.slots.slot_request import NewTokens, Running
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.processes import whole
from jaxlm.types import Trace


class StepResult:
    """The new tokens of a step, on the host."""

    def __init__(self, drawn: Drawn, trace: Trace, rows: Rows, taps: Sequence[Tap]):
        """Copies them from the devices.

        Args:
          drawn, trace: as `decode` returns them; with speculation `drawn` has one more
            axis, of the tokens of a pass.
          rows: after the step.
        """
        ends = (rows.is_done, rows.stop_states, rows.grammar_states)
        drawn, self._trace, (is_done, *states) = whole((drawn, trace, ends))
        if drawn.is_proposed is not None:
            drawn = jax.tree.map(_in_a_row, drawn)
        self._drawn: Any = drawn
        self._taps = taps
        self.is_done: Bool[np.ndarray, " B"] = is_done
        """Whether the text in each slot has ended."""
        self._has_ended = np.any([x == ENDED for x in states], axis=0)

    def is_finite(self, slot: int) -> bool:
        """Whether the logits of a row were numbers."""
        return not np.isnan(self._drawn.logprobs[slot]).any()

    def new_tokens(self, running: Running, slot: int, num_top: int) -> NewTokens:
        """Returns what is new in the text in a slot, and counts it there."""
        drawn, inside = self._drawn, self._drawn.inside[slot]
        count = int(inside.sum())
        running.length += count
        trace = row_of_steps(self._taps, self._trace, slot, count)
        if running.prompt_trace is not None:
            trace = joined(self._taps, [running.prompt_trace, trace])
            running.prompt_trace = None
        is_full = running.length == running.request.sample.max_new_tokens
        is_cut = is_full and not self._has_ended[slot]
        ended = None
        if self.is_done[slot]:
            ended = "length" if is_cut else "stop"
        num_proposed = num_accepted = 0
        if drawn.is_proposed is not None:
            proposed = drawn.is_proposed[slot]
            num_proposed, num_accepted = proposed.sum(), (proposed & inside).sum()
        return NewTokens(
            running.number,
            drawn.tokens[slot, inside],
            drawn.logprobs[slot, inside],
            drawn.top_tokens[slot, inside, :num_top],
            drawn.top_logprobs[slot, inside, :num_top],
            ended,
            trace,
            *(int(num_proposed), int(num_accepted)),
        )


def _in_a_row(x: np.ndarray) -> np.ndarray:
    """[B, passes, K + 1, ...] -> [B, passes * (K + 1), ...]."""
    return x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:])
