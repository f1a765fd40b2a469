"""`metrics.jsonl` in a run folder: one JSON object per line, written during the run.

A row has `kind`, `step` and the fields of its kind (`FIELDS`). Floats read back
exactly. NaN and infinities are written as the strings "nan", "inf" and "-inf", so that
each line is valid JSON. The last field of a row is the CRC-32 of the row without it, so
that damage which leaves valid JSON is seen too; rows of earlier versions have none.
"""

import collections
import contextlib
import errno
import io
import itertools
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxlm.files.bounded import read_bounded
from jaxlm.files.durable import replacing, sync
from jaxlm.terminal.printable import error_line, shown_value

FILE_NAME = "metrics.jsonl"
MAX_BYTES = 1 << 30  # of a log: about four million rows
MAX_WAITING = 20_000  # rows that are kept while they cannot be written
PREVIOUS, DAMAGED = "metrics.previous.jsonl", "metrics.damaged.jsonl"
UNWRITTEN, DROPPED = "metrics.unwritten.jsonl", "metrics.dropped.jsonl"

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
    "look": {
        "entropy": "mean entropy of the next token of a sentence, nats",
        "lens_depth": "mean number of layers until the logit lens has the answer",
        "previous": "the best head's probability on the token before",
        "induction": "the best head's on what followed the same token before",
        "memory": "what feed-forwards add to the logit of the token that follows, over "
        "the mean of all tokens; null if logits are no sum over layers",
        "previous_heads": "that of all heads, by layer",
        "induction_heads": "that of all heads, by layer",
        "memory_layers": "that of each feed-forward; null likewise",
    },
    "event": {"event": "what happened, such as 'resume'"},
}

# Fields that are never read as numbers: a sample may be the text "nan".
TEXT_FIELDS = ("kind", "text", "prompt", "event", "message")
_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"}$')
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

logger = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """Receives the rows of a run after they were written to `metrics.jsonl`."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes a row; its numbers are plain and may be NaN or infinite."""

    def close(self, failed: bool) -> None:
        """Takes the end of this start of the run; `failed`: by an exception."""


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


def _to_line(row: dict[str, Any]) -> bytes:
    text = json.dumps(row, allow_nan=False)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def _parse_line(line: bytes, where: str, checked: bool) -> tuple[dict[str, Any], bool]:
    """Returns a row and whether it has a checksum, which it must have if `checked`."""
    checksum = _CHECKSUM.search(line)
    if checksum:
        line = line[: checksum.start()] + b"}"
        if zlib.crc32(line) != int(checksum[1], 16):
            raise ValueError(f"{where}: it is damaged (its checksum is wrong)")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if checked and not checksum:
        raise ValueError(f"{where}: it is damaged (it has no checksum)")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    if not isinstance(row.get("kind"), str):
        raise ValueError(f"{where}: no text field 'kind'")
    step = row.get("step")
    if not _is_number(step) or isinstance(step, float):
        raise ValueError(f"{where}: no whole number 'step'")
    row = _decode(row)
    for name in FIELDS[row["kind"]] if row["kind"] in ("train", "eval") else ():
        if name in row and row[name] is not None and not _is_number(row[name]):
            raise ValueError(f"{where}: {name} is {shown_value(row[name])}")
    times = row.get("time_s", {})
    if not isinstance(times, dict) or not all(map(_is_number, times.values())):
        raise ValueError(f"{where}: time_s is {shown_value(times)}")
    return row, checksum is not None


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 1000
    return isinstance(value, float)


class _Log(NamedTuple):
    """The lines of a file, without line ends."""

    rows: list[tuple[bytes, dict[str, Any]]]
    """Each line that is a row, and the row."""
    damaged: list[tuple[bytes, ValueError]]
    """Each line that is not, and why; but not a last one that is only half written."""


def _parse(data: bytes, path: Path) -> _Log:
    log, checked = _Log([], []), False
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        # A killed process leaves a line without a newline, a power cut perhaps zeros.
        cut_off = number == len(lines) or (
            b"\0" in line and not any(rest.strip() for rest in lines[number:])
        )
        try:
            row, checked = _parse_line(line, f"{path}, line {number}", checked)
            log.rows.append((line, row))
        except ValueError as error:
            if not cut_off:
                log.damaged.append((line, error))
    return log


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Reads the rows of a run in the order written, non-finite numbers as floats.

    A last line that is only half written, as in a run in progress, is dropped.

    Raises:
      ValueError: if there is no such file, or a line (named) is not a row.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {run_dir} the folder of a run?")
    log = _parse(read_bounded(path, MAX_BYTES), path)
    if log.damaged:
        raise log.damaged[0][1]
    return [row for _, row in log.rows]


def kinds_at(run_dir: Path | str, step: int) -> set[str]:
    """Returns the kinds of the rows that a run has of a step; of none if unreadable."""
    path = Path(run_dir) / FILE_NAME
    try:
        # A pipe would be waited for.
        log = _parse(read_bounded(path, MAX_BYTES) if path.is_file() else b"", path)
    except OSError:
        return set()
    return {row["kind"] for _, row in log.rows if row["step"] == step}


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends rows to `metrics.jsonl` in a run folder. Only one may be open per run.

    Each row is a single write, so a killed process loses no earlier row and leaves at
    most half of one, which the next start removes. Nothing here ends a run: damaged
    lines are moved to `metrics.damaged.jsonl`, or `metrics.damaged-2.jsonl` and so on;
    if the file cannot be written (a full disk), it warns once, keeps the rows in memory
    and tries again with each row and each save, and writes them to
    `metrics.unwritten.jsonl` if it never can; a file that was deleted is begun anew,
    but not in a folder that has taken the place of the run's, perhaps with another run,
    until that is known to be this run's; and a sink that fails gets no more rows.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        resume_step: int | None = None,
        sinks: Sequence[Sink] = (),
        is_own: Callable[[], bool] = lambda: True,
    ):
        """Opens the file, and creates the folder if needed; a failure is logged.

        Args:
          run_dir: folder of the run.
          resume_step: the step to resume after. Rows of later steps, which will be
            repeated, move to `metrics.dropped.jsonl`. None starts an empty file, and
            keeps the rows of an earlier run as `metrics.previous.jsonl`, or
            `-2.jsonl` and so on.
          sinks: what also receives each row.
          is_own: whether what is in the place of the folder now is the run's.
        """
        self.path = Path(run_dir) / FILE_NAME
        self.last_train: dict[str, Any] | None = None
        """The last training row kept or written; its totals are continued."""
        self.last_before: dict[str, Any] | None = None
        """The last training row of the start before, kept or not."""
        self.lost_rows = 0
        """Number of rows that could not be written, nor kept until they could."""
        self._waiting: collections.deque[bytes] = collections.deque()
        self._warned = False
        self._sinks, self._is_own = list(sinks), is_own
        self._file: io.FileIO | None = None
        self._is_synced = False
        self._resume_step = resume_step  # None when later rows are dropped
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None and self.path.exists() and self.path.stat().st_size:
                previous = self._new_file(PREVIOUS)
                os.replace(self.path, previous)
                logger.warning(
                    "%s is of a run without a checkpoint: training begins at step 0, "
                    "and that log is now %s",
                    *(self.path, previous.name),
                )
            self._open()
        except OSError as error:
            self._warn_of(error)

    def _keep_up_to(self, step: int) -> None:
        """Drops later rows, damaged ones and a half-written last line, all at once.

        Later rows are those of steps that are repeated, but perhaps not as they were:
        with other flags, or where the newest steps are gone. They are kept elsewhere.
        """
        if not self.path.is_file():
            return
        try:
            data = read_bounded(self.path, MAX_BYTES)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            previous = self._new_file(PREVIOUS)
            os.replace(self.path, previous)
            logger.warning(
                "%s: %s; it is now %s, and the log begins anew",
                *(self.path, error.strerror, previous.name),
            )
            return
        log = _parse(data, self.path)
        kept = [(line, row) for line, row in log.rows if row["step"] <= step]
        trains = [row for _, row in log.rows if row["kind"] == "train"]
        self.last_before = trains[-1] if trains else None
        trains = [row for row in trains if row["step"] <= step]
        self.last_train = self.last_train or (trains[-1] if trains else None)
        text = b"".join(line + b"\n" for line, _ in kept)
        # A link is replaced by a file: its target is not this run's.
        if text == data and not self.path.is_symlink():
            return
        with replacing(self.path) as file:
            file.write(text)
            file.flush()  # With a full disk it fails here, and nothing is set aside.
            if log.damaged:
                self._set_aside(log.damaged)
            self._keep_dropped(line for line, row in log.rows if row["step"] > step)

    def _keep_dropped(self, lines: Iterable[bytes]) -> None:
        text = b"".join(line + b"\n" for line in lines)
        path = self.path.with_name(DROPPED)
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            path = self._new_file(DROPPED)
        if text:
            with path.open("ab") as file:
                file.write(text)

    def _set_aside(self, lines: Sequence[tuple[bytes, ValueError]]) -> None:
        damaged = self._new_file(DAMAGED)
        with replacing(damaged) as file:
            file.writelines(line + b"\n" for line, _ in lines)
        logger.warning(
            "%s; moved to %s (%d damaged in all), and the log goes on",
            *(lines[0][1], damaged.name, len(lines)),
        )

    def _new_file(self, name: str) -> Path:
        """Returns a path beside the log that nothing has yet."""
        first = path = self.path.with_name(name)
        numbers = itertools.count(2)
        while os.path.lexists(path):
            path = first.with_stem(f"{first.stem}-{next(numbers)}")
        return path

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a row.

        Args:
          kind: 'train', 'eval', 'sample', 'look' or 'event'.
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
        self._waiting.append(_to_line(row))
        self._append()
        if kind == "train":
            self.last_train = _decode(dict(row))
        for sink in tuple(self._sinks):
            try:
                sink.write(_decode(dict(row)))
            except Exception as error:
                self._sinks.remove(sink)
                _warn(sink, error)

    def _append(self) -> None:
        """Writes the rows that wait, in order, as far as that is possible."""
        try:
            while self._waiting:
                self._is_synced = False
                self._append_line(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._warn_of(error)
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self.lost_rows += 1

    def _append_line(self, line: bytes) -> None:
        file = self._file
        if file is None or not self._is_there(file):
            file = self._open()
        # Somebody else may have cut the file, or added to it.
        size = os.fstat(file.fileno()).st_size
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            while line:  # The system may take a part.
                count = file.write(line)
                if not count:
                    raise OSError("nothing was written")
                line = line[count:]
        except OSError:
            with contextlib.suppress(OSError):  # It may be a device.
                file.truncate(size)
            raise

    def _open(self) -> io.FileIO:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.path.is_fifo():
            raise OSError(errno.EINVAL, "a pipe, which would be waited for")
        if not self._is_own():
            raise OSError(errno.EEXIST, "the folder was moved or replaced")
        # With a full disk perhaps not at once.
        if self._resume_step is not None:
            self._keep_up_to(self._resume_step)
            self._resume_step = None
        self._file = io.FileIO(self.path, "a+b")
        return self._file

    def sync(self) -> None:
        """Waits until the rows are on the disk, as the step of which they are will be.

        After a power cut a run goes on from that step, and does not write them again.
        """
        self._append()
        if self._file is not None and not self._is_synced:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
                sync(self.path.parent)
                self._is_synced = True

    def _is_there(self, file: io.FileIO) -> bool:
        """Whether nobody has deleted or replaced the file."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False

    def _warn_of(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s cannot be written (%s): training goes on, and its rows wait "
                "until it can",
                *(self.path, error.strerror or error),
            )

    def close(self, failed: bool = False) -> None:
        """Closes the file, which is on the disk then, and the sinks."""
        self.sync()
        if self._waiting:
            self._write_beside()
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            try:
                sink.close(failed)
            except Exception as error:
                _warn(sink, error)

    def _write_beside(self) -> None:
        """Writes the rows that wait into a new file: the log may be another user's."""
        where, self.lost_rows = "", self.lost_rows + len(self._waiting)
        with contextlib.suppress(OSError):
            if self._is_own():
                kept = self._new_file(UNWRITTEN)
                with replacing(kept, None) as file:
                    file.writelines(self._waiting)
                where = f"; {len(self._waiting)} are in {kept.name}"
        self._waiting.clear()
        logger.warning("%s lacks %d rows%s", self.path, self.lost_rows, where)

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        self.close(failed=kind is not None)


class NoMetrics(MetricsWriter):
    """Writes nothing: another process of the run does."""

    def __init__(self):
        self.last_train = self.last_before = None
        self.lost_rows = 0

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self, failed: bool = False) -> None:
        """Does nothing."""


def _warn(sink: Sink, error: Exception) -> None:
    logger.warning(
        "%s failed and is turned off, training goes on: %s",
        *(type(sink).__name__, error_line(error)),
    )
