"""Where the time of a run goes, over all its starts."""

from collections.abc import Mapping
from typing import Any

KINDS = {
    "steps": "training steps that count",
    "data": "steps that waited for their batch",
    "compiling": "the first step of each start, mostly compiling",
    "saving": "waiting for checkpoints",
    "looking": "evaluations, samples and reports",
    "starting": "from the start of the process to its first step",
    "lost": "steps that were done again after a restart",
}
"""What a run's seconds are told apart by. Goodput is the share of the first."""


class Goodput:
    """Seconds of each of `KINDS`; training rows carry them on to the next start."""

    def __init__(self, kept: Mapping[str, Any] | None, last: Mapping[str, Any] | None):
        """Continues the count of the earlier starts.

        Args:
          kept: the training row that this start continues from; None for none.
          last: the last training row of the start before, perhaps of a later step.
        """
        self.seconds = dict.fromkeys(KINDS, 0.0) | (last or {}).get("time_s", {})
        kept_s = (kept or {}).get("time_s", {}).get("steps", 0.0)
        again_s = max(self.seconds["steps"] - kept_s, 0.0)
        self.seconds["steps"] -= again_s
        self.seconds["lost"] += again_s

    def add(self, kind: str, seconds: float) -> None:
        """Adds seconds to one of `KINDS`."""
        self.seconds[kind] += seconds
