"""How long the stages of decoding take."""

import time
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field

from jaxlm.infer.decoding.model_programs import Programs


@dataclass
class Clock:
    """Seconds of the stages of decoding, without compiling and preparing weights."""

    programs: Programs
    prefill_s: float = 0.0
    decode_s: float = 0.0
    _compiled_before: float = field(init=False)
    _last: float = field(init=False, default=0.0)
    _waited_s: float = field(init=False, default=0.0)

    def __post_init__(self):
        self._compiled_before = self.programs.compile_s
        self.lap()

    @property
    def compile_s(self) -> float:
        """Seconds of compiling, and of waiting for what compiles in a thread."""
        return self.programs.compile_s - self._compiled_before + self._waited_s

    def wait(
        self, compiling: Sequence[futures.Future[None]], seconds: float | None = None
    ) -> None:
        """Waits until one of these programs is compiled, at most so many seconds."""
        start = time.perf_counter()
        futures.wait(compiling, seconds, futures.FIRST_COMPLETED)
        self._waited_s += time.perf_counter() - start

    def lap(self) -> float:
        """Returns the seconds since the last call, without compiling."""
        now = time.perf_counter() - self.programs.compile_s - self._waited_s
        before, self._last = self._last, now
        return now - before
