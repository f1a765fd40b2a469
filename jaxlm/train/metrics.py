"""`metrics.jsonl` in a run folder: one JSON object per line, written during the run.

A row has `kind`, `step` and the fields of its kind (`FIELDS`). Floats read back
exactly. NaN and infinities are written as the strings "nan", "inf" and "-inf", so that
each line is valid JSON.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxlm.durable import replacing

FILE_NAME = "metrics.jsonl"

# The required fields of each kind of row; a row may have more.
FIELDS: Mapping[str, Mapping[str, str]] = {
    "train": {
        "loss": "nats per token",
        "lr": "learning rate",
        "grad_norm": "global norm of the gradient, before clipping",
        "tokens_per_s": "tokens trained on per second, over all devices",
        "mfu": "share of the devices' peak FLOP/s, 0 to 1; null if unknown",
        "data_wait_s": "seconds per step spent waiting for the batch",
        "step_s": "seconds per step, including the wait",
        "tokens": "tokens seen so far",
        "wall_s": "seconds of training so far, over all starts of the run",
    },
    "eval": {
        "loss": "nats per token of held-out text",
        "bits_per_byte": "bits per byte of held-out text; null if unknown",
        "targets": "number of predicted tokens",
    },
    "sample": {"text": "generated text", "prompt": "the text that it continues"},
    "event": {"event": "what happened, such as 'resume'"},
}

# Fields that are never read as numbers: a sample may be the text "nan".
TEXT_FIELDS = ("kind", "text", "prompt", "event", "message")
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

logger = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """Receives the rows of a run after they were written to `metrics.jsonl`."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row; its numbers are plain and may be NaN or infinite."""

    def close(self, failed: bool) -> None:
        """Takes the end of this start of the run; `failed`: by an exception."""


def one_line(error: Exception) -> str:
    """Returns what an exception says in at most 300 characters without line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _encode(value: Any) -> Any:
    """Converts `value` to something that JSON represents exactly."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if getattr(value, "ndim", None) == 0:  # NumPy and jax scalars
        return _encode(value.item())
    raise ValueError(
        f"a metric is a {type(value).__name__}: it must be a number, a text, or a "
        "list or mapping of these"
    )


def _decode(row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        if isinstance(value, str) and value in NON_FINITE and name not in TEXT_FIELDS:
            row[name] = NON_FINITE[value]
    return row


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    if not isinstance(row.get("kind"), str):
        raise ValueError(f"{where}: no text field 'kind'")
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{where}: no whole number 'step'")
    return _decode(row)


def _parse(data: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Returns lines and rows, without a last line that is only half written."""
    parsed = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        # A killed process leaves a line without a newline, a power cut perhaps zeros.
        cut_off = number == len(lines) or (
            b"\0" in line and not any(rest.strip() for rest in lines[number:])
        )
        try:
            parsed.append((line, _parse_line(line, f"{path}, line {number}")))
        except ValueError:
            if not cut_off:
                raise
    return parsed


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Reads the rows of a run in the order written, non-finite numbers as floats.

    A last line that is only half written, as in a run in progress, is dropped.

    Raises:
      ValueError: if there is no such file, or a line (named) is not a row.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {run_dir} the folder of a run?")
    return [row for _, row in _parse(path.read_bytes(), path)]


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends rows to `metrics.jsonl` in a run folder. Only one may be open per run.

    Each row is a single write, so a killed process loses no earlier row and leaves at
    most half of one, which the next start removes. If the file cannot be written (a
    full disk), it warns once and the run continues. The same holds for a sink that
    fails, which gets no more rows.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        resume_step: int | None = None,
        sinks: Sequence[Sink] = (),
    ):
        """Opens the file, and creates the folder if needed.

        Args:
          run_dir: folder of the run.
          resume_step: the step to resume after. Rows of later steps are dropped, since
            those steps will be repeated. None starts an empty file, and keeps the rows
            of an earlier run as `metrics.previous.jsonl`.
          sinks: what also receives each row.

        Raises:
          ValueError: if a line of the file (named in the message) is not a row.
          OSError: if the folder cannot be written.
        """
        self.path = Path(run_dir) / FILE_NAME
        self.last_train: dict[str, Any] | None = None
        """The last training row kept or written; its totals are continued."""
        self.lost_rows = 0
        """Number of rows that could not be written."""
        self._warned = False
        self._sinks = list(sinks)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            self._keep_up_to(resume_step)
        elif self.path.exists() and self.path.stat().st_size:
            os.replace(self.path, self.path.with_name("metrics.previous.jsonl"))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._good_size = self._file.tell()

    def _keep_up_to(self, step: int) -> None:
        """Drops later rows and a half-written last line, in one atomic replacement."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        kept = [(ln, row) for ln, row in _parse(data, self.path) if row["step"] <= step]
        trains = [row for _, row in kept if row["kind"] == "train"]
        self.last_train = trains[-1] if trains else None
        text = b"".join(line + b"\n" for line, _ in kept)
        if text == data:
            return
        with replacing(self.path) as file:
            file.write(text)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a row.

        Args:
          kind: 'train', 'eval', 'sample' or 'event'.
          step: number of optimizer steps done.
          **values: at least the fields of the kind in `FIELDS`; numbers may be NumPy
            or JAX scalars.

        Raises:
          ValueError: for an unknown kind, a missing field, or a value that JSON cannot
            hold.
        """
        if kind not in FIELDS:
            raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(FIELDS)}")
        missing = [name for name in FIELDS[kind] if name not in values]
        if missing:
            raise ValueError(f"a {kind} row lacks {', '.join(missing)}")
        row = _encode({"kind": kind, "step": step, **values})
        if self.lost_rows:
            row["lost_rows"] = self.lost_rows  # makes the gap visible
        self._append(json.dumps(row, allow_nan=False).encode() + b"\n")
        if kind == "train":
            self.last_train = _decode(dict(row))
        for sink in tuple(self._sinks):
            try:
                sink.write(_decode(dict(row)))
            except Exception as error:
                self._sinks.remove(sink)
                _warn(sink, error)

    def _append(self, line: bytes) -> None:
        try:
            if self._file.tell() != self._good_size:  # left by a failed write
                self._file.truncate(self._good_size)
                self._file.seek(self._good_size)
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written")
            self._good_size += len(line)
        except OSError as error:
            self.lost_rows += 1
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s cannot be written (%s): training goes on, rows are lost until "
                    "it can",
                    *(self.path, error),
                )

    def close(self, failed: bool = False) -> None:
        """Closes the file and the sinks; no more rows can be written."""
        self._file.close()
        for sink in self._sinks:
            try:
                sink.close(failed)
            except Exception as error:
                _warn(sink, error)

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        self.close(failed=kind is not None)


def _warn(sink: Sink, error: Exception) -> None:
    logger.warning(
        "%s failed and is turned off, training goes on: %s",
        *(type(sink).__name__, one_line(error)),
    )
