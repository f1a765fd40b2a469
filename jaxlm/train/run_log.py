"""What the training loop writes and shows, and where its time goes."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxlm.checkpoint.native.save_error import SaveError
from jaxlm.config import Config
from jaxlm.terminal.progress import ProgressLine, Waiting
from jaxlm.train.metrics import MetricsWriter
from jaxlm.train.step import StepMetrics
from jaxlm.train.stopping import NotFinite
from jaxlm.train.throughput import flops_per_token, peak_flops
from jaxlm.types import Batch

# A run shows at least this often that it goes on.
SHOW_SECONDS = 1.0
# Steps that may wait for the device while it computes one.
AHEAD = 2


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps, 0 for never, is due."""
    return every > 0 and step % every == 0


KINDS = {
    "steps": "training steps that count",
    "data": "steps that waited for their batch",
    "compiling": "the first step of each start, mostly compiling",
    "saving": "waiting for checkpoints",
    "looking": "evaluations, samples and reports",
    "starting": "from the start of the process to its first step",
    "lost": "steps that were done again after a restart",
}
"""How the seconds of a run are divided. Goodput is the share of the first."""


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


class RunLog:
    """Writes metrics to `metrics.jsonl` and to the terminal, and measures time.

    The metrics of a step stay on the device until they are read, at least once a
    second.
    """

    def __init__(
        self, config: Config, writer: MetricsWriter, progress: ProgressLine, first: int
    ):
        """`first` is the first step of this process, which compiles."""
        self._train, self._writer, self._progress = config.train, writer, progress
        self._first = first
        self._pending: list[tuple[int, StepMetrics, float]] = []
        self._wait = 0.0
        # Since the last row: seconds of training, and the wait of each step.
        self._seconds, self._waits = 0.0, []
        self._step_s = 0.0  # of the steps that were read last
        self._awaited: set[str] = set()
        last = writer.last_train or {}
        self._wall = last.get("wall_s") or 0.0
        length = config.data.sequence_length
        self._tokens_per_step = config.train.batch_size * length
        self._flops = flops_per_token(config.model, length)
        self._peak = peak_flops(jax.devices())
        self._since, self._pause = time.monotonic(), 0.0
        self.goodput = Goodput(writer.last_train, writer.last_before)

    def timed_next(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch, and measures the wait for the row of its step."""
        start = time.monotonic()
        batch = next(batches)
        self._wait = time.monotonic() - start
        return batch

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Queues the metrics of a step that may still be running.

        Waits until few steps are: more would only delay what the terminal shows, and
        the answer to Ctrl-C.
        """
        self._pending.append((step, metrics, self._wait))
        if len(self._pending) > AHEAD:
            jax.block_until_ready(self._pending[-1 - AHEAD])

    def is_due(self, step: int) -> bool:
        """Whether the metrics should be read: for a row, or to show that it goes on.

        Slow steps are read one by one, as the device need not be ahead of the host.
        """
        return (
            due(step, self._train.log_every)
            or step == self._first + 1  # the first that tells how long one takes
            or self._step_s >= SHOW_SECONDS
            or time.monotonic() - self._since - self._pause >= SHOW_SECONDS
        )

    def waiting(self, doing: str) -> Waiting:
        """Shows what the loop does if that takes long; the first time it compiles."""
        if doing in self._awaited or doing == "saving":
            return Waiting(doing, in_logs=False)
        self._awaited.add(doing)
        return Waiting(f"compiling and {doing}")

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Counts what runs inside as `kind` of `KINDS`, not as steps."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self._pause += seconds
        self.goodput.add(kind, seconds)

    def first_step(self, step: int, seconds: float) -> None:
        """Records the time from process start to the end of the first step."""
        self._writer.write("event", step, event="first step", since_start_s=seconds)

    def evaluation(
        self,
        step: int,
        sums: Sequence[tuple[Float[np.ndarray, ""], Float[np.ndarray, ""]]],
        bytes_per_token: float | None,
    ) -> None:
        """Writes the held-out loss, from sums of cross-entropies and of weights.

        Raises:
          NotFinite: if it is not finite.
        """
        entropy, targets = (math.fsum(s) for s in zip(*sums, strict=True))
        loss, bits, shown = entropy / targets, None, ""
        if bytes_per_token is not None:
            bits = loss / math.log(2) / bytes_per_token
            shown = f", {bits:.4f} bits per byte"
        self._writer.write(
            "eval", step, loss=loss, bits_per_byte=bits, targets=int(targets)
        )
        self._progress.note(f"step {step}: held-out loss {loss:.4f}{shown}")
        if not math.isfinite(loss):
            raise NotFinite(
                f"step {step}: held-out loss {loss}: its state cannot be used; begin a "
                "new run from an earlier step (--init-from RUN/checkpoints/N), with a "
                "lower --optimizer.learning-rate"
            )

    def sample(self, step: int, text: str) -> None:
        """Writes a generated text."""
        prompt = self._train.sample_prompt
        self._writer.write("sample", step, text=text, prompt=prompt)
        shown = (prompt + text).strip("\n")
        self._progress.note(f"\n--- sample at step {step}\n{shown}\n")

    def look(self, step: int, fields: Mapping[str, Any]) -> None:
        """Writes what was seen inside."""
        self._writer.write("look", step, **fields)

    def sync(self) -> None:
        """Waits until the rows so far are on the disk."""
        self._writer.sync()

    def save_failed(self, step: int, error: SaveError) -> None:
        """Writes that a checkpoint could not be saved."""
        self._writer.write("event", step, event="save failed", message=str(error))
        self._progress.note(f"{error}; the run goes on")

    def read(self) -> None:
        """Waits for the pending steps, checks them, and writes the rows that are due.

        Raises:
          NotFinite: if a loss or a gradient norm is not finite, or too many steps in a
            row were skipped.
        """
        if not self._pending:
            return
        steps, metrics, waits = zip(*self._pending, strict=True)
        metrics = jax.tree.map(float, jax.device_get(metrics))
        now = time.monotonic()
        seconds = max(now - self._since - self._pause, 1e-9)
        self._pending, self._since, self._pause = [], now, 0.0
        self._wall += seconds
        self._step_s = seconds / len(steps)
        waited_s = min(sum(waits), seconds)
        self.goodput.add("data", waited_s)
        kind = "compiling" if steps[-1] == self._first else "steps"
        self.goodput.add(kind, seconds - waited_s)
        self._seconds += seconds
        self._waits += waits
        for step, m in zip(steps, metrics, strict=True):
            self._check(step, m)
        step, m = steps[-1], metrics[-1]  # Steps of a row are read at once.
        row = {
            **{"loss": m.loss, "lr": m.lr, "grad_norm": m.grad_norm},
            **({} if m.expert_load is None else {"expert_load": m.expert_load}),
            **self._timing(step),
            "tokens": self._tokens_per_step * step,
            "wall_s": self._wall,
            "time_s": self.goodput.seconds,
        }
        is_row = due(step, self._train.log_every) or step == self._train.steps
        if is_row:
            with self.paused("looking"):  # sinks and the report take time too
                self._writer.write("train", step, **row)
        if is_row or step == self._first:
            self._seconds, self._waits = 0.0, []
        if step == self._first:  # Its seconds are those of compiling.
            row = {"loss": m.loss, "lr": m.lr}
        self._progress.update({"step": step, **row})

    def _check(self, step: int, m: StepMetrics) -> None:
        """Reports a step that was skipped, or raises NotFinite if it ends the run."""
        finite = math.isfinite(m.loss) and math.isfinite(m.grad_norm)
        batch = self._train.batch_of(step)
        where = f"step {step}" if batch == step else f"step {step} (batch {batch})"
        what = f"{where}: loss {m.loss:.4g}, gradient norm {m.grad_norm:.4g}"
        kind = "a spike" if finite else "not finite"
        advice = "lower --optimizer.learning-rate or look at the batch"
        if step == self._first > 1:
            # Perhaps its weights were saved before they had been used.
            advice += f", or go back to before step {step - 1} with --resume-step"
        if m.skipped_in_a_row is None and not finite:
            raise NotFinite(f"{what}: {kind}, so nothing was saved since; {advice}")
        if not m.skipped_in_a_row:
            return
        values = {"batch": batch, "loss": m.loss, "grad_norm": m.grad_norm}
        with self.paused("looking"):
            self._writer.write("event", step, event="step skipped", **values)
        if m.skipped_in_a_row > self._train.skip_spikes:
            raise NotFinite(
                f"{what}: {kind}, after {self._train.skip_spikes} steps in a row that "
                f"were skipped (--train.skip-spikes); {advice}"
            )
        self._progress.note(f"{what}: {kind}, so this step is not applied")

    def _timing(self, step: int) -> dict[str, float | None]:
        """Rates over the steps since the last row; None for the step that compiled."""
        rate = mfu = None
        count = len(self._waits)
        if step != self._first:
            rate = self._tokens_per_step * count / self._seconds
            mfu = rate * self._flops / self._peak if self._peak else None
        return {
            "tokens_per_s": rate,
            "mfu": mfu,
            "data_wait_s": sum(self._waits) / count,
            "step_s": self._seconds / count,
        }
