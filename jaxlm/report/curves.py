"""Reads runs, and computes curves and figures for the report and the picture."""

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxlm.config import ModelConfig
from jaxlm.fields import from_dict
from jaxlm.files.bounded import read_bounded
from jaxlm.files.strict_json import parse_object
from jaxlm.model.params import count_matmul_params
from jaxlm.terminal.progress import format_count, format_seconds
from jaxlm.train.metrics import read_metrics

# Points of a curve; longer ones are thinned.
MAX_POINTS = 2000
# Smoothing averages over 1/50 of the rows on either side; page.js has the slider.
SMOOTHING = 50
MAX_CONFIG_BYTES = 16 << 20

# JSON can hold integers that no float can.
_MAX = 1 << 1000
# A JSON object, as in config.json.
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, as read from its folder."""

    name: str
    """The folder's name, with as much of its path as makes the names distinct."""
    rows: list[Json]
    """All rows of `metrics.jsonl`, in the order written."""
    config: Json
    """Contents of `config.json`; empty if there is none."""

    def of_kind(self, kind: str) -> list[Json]:
        """Returns the rows of one kind, in the order written."""
        return [row for row in self.rows if row["kind"] == kind]


def load_runs(folders: Path | str | Iterable[Path | str]) -> list[Run]:
    """Reads one run folder or several.

    Raises:
      ValueError: if no folder is given, a folder has no metrics, or a file (named)
        cannot be parsed.
    """
    several = not isinstance(folders, str | Path)
    paths = [Path(folder) for folder in (folders if several else [folders])]
    if not paths:
        raise ValueError("no run folder was given: name at least one")
    names = _distinct_names([Path(os.path.realpath(path)) for path in paths])
    return [
        Run(name=name, rows=read_metrics(path), config=_read_config(path))
        for name, path in zip(names, paths, strict=True)
    ]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def _read_config(folder: Path) -> Json:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    return parse_object(read_bounded(path, MAX_CONFIG_BYTES), str(path))


def column(rows: Sequence[Json], name: str) -> Float[np.ndarray, " rows"]:
    """Returns one field of the rows as f64; NaN if it is missing or not a number."""
    values = [row.get(name) for row in rows]
    return np.array(
        [
            float(v)
            if isinstance(v, float) or (isinstance(v, int) and abs(v) <= _MAX)
            else math.nan
            for v in values
        ],
        float,
    )


def downsample(values: Float[np.ndarray, " n"], limit: int) -> Int[np.ndarray, " m"]:
    """Picks indices of at most `limit` (>= 5) values that keep a curve's shape.

    From each of several equal buckets it keeps the minimum, the maximum and the first
    non-finite value, so no spike or gap is lost. It also keeps the first and the last
    value.
    """
    n = len(values)
    if n <= limit:
        return np.arange(n)
    keep = [0, n - 1]
    edges = np.linspace(0, n, (limit - 2) // 3 + 1).astype(int)
    finite = np.isfinite(values)
    for start, end in itertools.pairwise(edges):
        good = start + np.flatnonzero(finite[start:end])
        if len(good):
            keep += [good[values[good].argmin()], good[values[good].argmax()]]
        if len(good) < end - start:
            keep.append(start + int(finite[start:end].argmin()))
    return np.unique(keep)


def bucket_means(
    values: Float[np.ndarray, " n"], limit: int
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Returns middle index and mean of the finite values of `limit` equal buckets."""
    edges = np.linspace(0, len(values), min(limit, len(values)) + 1).astype(int)
    middles, means = [], []
    for start, end in itertools.pairwise(edges):
        part = values[start:end]
        part = part[np.isfinite(part)]
        middles.append((start + end - 1) // 2)
        means.append(part.mean() if len(part) else math.nan)
    return np.array(middles, int), np.array(means, float)


def smooth(values: Float[np.ndarray, " n"], half_width: int) -> Float[np.ndarray, " n"]:
    """Applies a moving mean over `half_width` values on either side, twice.

    The window is centered, so the curve does not lag. It shrinks towards the start,
    where a loss falls fast, and is cut off at the end. Non-finite values are left out
    of the mean, and become NaN. `page.js` does the same.
    """
    finite = np.isfinite(values)
    index = np.arange(len(values))
    half = np.minimum(index, half_width)
    start, end = index - half, np.minimum(index + half + 1, len(values))
    counts = np.concatenate([[0], np.cumsum(finite)])
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
        total = np.maximum(counts[end] - counts[start], 1)
        values = np.where(finite, (sums[end] - sums[start]) / total, math.nan)
    return values


def smoothed_loss(
    losses: Float[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Returns indices and values of the smoothed curve of training losses.

    The picture draws it, the page begins with it, and its end is the last training
    loss. It is smoothed by 2 % of its length; with fewer than 50 rows not at all.
    """
    indices = np.arange(len(losses))
    if len(losses) > MAX_POINTS:
        indices, losses = bucket_means(losses, MAX_POINTS // 3)
    return indices, smooth(losses, len(losses) // SMOOTHING)


def _last(rows: Sequence[Json], name: str) -> float:
    """Returns the last number of a column, or NaN."""
    values = column(rows[-1:], name)
    return float(values[-1]) if len(values) else math.nan


def final_losses(run: Run) -> tuple[float | None, float | None]:
    """Returns the last training loss (end of the smoothed curve) and held-out loss.

    In nats per token; None if there is no row.
    """
    _, losses = smoothed_loss(column(run.of_kind("train"), "loss"))
    evals = run.of_kind("eval")
    return (
        float(losses[-1]) if len(losses) else None,
        _last(evals, "loss") if evals else None,
    )


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def _model(run: Run) -> tuple[str, str]:
    """Describes the model and its number of parameters."""
    params = next((row["params"] for row in run.rows if "params" in row), None)
    model = run.config.get("model")
    try:
        config = from_dict(ModelConfig, model if isinstance(model, dict) else {})
    except (ValueError, TypeError):  # written by another version
        return "", format_count(params) if isinstance(params, int | float) else ""
    shape = (
        f"{config.num_layers} layers × {config.model_dim}, {config.num_heads} heads, "
        f"context {config.context_length}"
    )
    if isinstance(params, int | float):
        return shape, format_count(params)
    if not config.vocab_size:
        return shape, ""
    return shape, f"{format_count(count_matmul_params(config))} in matmuls"


def figures(run: Run) -> dict[str, str]:
    """Returns the figures of a run as text, by label; empty if unknown."""
    trains, evals = run.of_kind("train"), run.of_kind("eval")
    train, held_out = final_losses(run)
    shape, params = _model(run)
    train_config = run.config.get("train")
    steps = train_config.get("steps") if isinstance(train_config, dict) else None
    done = str(run.rows[-1]["step"]) if run.rows else "0"
    losses, lowest = column(evals, "loss"), ""
    if np.isfinite(losses).any():
        best = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))
        lowest = f"{_number(losses[best])} at step {evals[best]['step']}"
    waits = np.nansum(column(trains, "data_wait_s"))
    total = np.nansum(column(trains, "step_s"))
    resumed = [str(r["step"]) for r in run.rows if r.get("event") == "resume"]
    bad = int((~np.isfinite(column(trains, "loss"))).sum())
    tokens_per_s = _median(trains, "tokens_per_s")
    return {
        "Model": shape,
        "Parameters": params,
        "Steps": f"{done} of {steps}" if steps is not None else done,
        "Resumed after step": ", ".join(resumed),
        "Tokens seen": _or_empty(format_count, _last(trains, "tokens")),
        "Training time": _or_empty(format_seconds, _last(trains, "wall_s")),
        "Train loss (nats per token, end of the smoothed curve)": (
            "" if train is None else _number(train)
        ),
        "Held-out loss (nats per token)": "" if held_out is None else _number(held_out),
        "Lowest held-out loss": lowest,
        "Bits per byte of held-out text": _or_empty(
            _number, _last(evals, "bits_per_byte")
        ),
        "Tokens per second (median)": _or_empty(format_count, tokens_per_s),
        "MFU (share of the peak FLOP/s, median)": _or_empty(
            _percent, _median(trains, "mfu")
        ),
        **_time(trains),
        "Time spent waiting for data": _percent(waits / total) if total > 0 else "",
        "Rows with a non-finite loss": str(bad) if bad else "",
    }


def _time(trains: Sequence[Json]) -> dict[str, str]:
    """Returns the goodput, and what took the other time, the largest part first."""
    seconds = trains[-1].get("time_s") if trains else None
    if not isinstance(seconds, dict) or not sum(seconds.values()):
        return {}
    total = sum(seconds.values())
    others = {k: s for k, s in seconds.items() if k != "steps" and s >= 0.001 * total}
    names = sorted(others, key=others.__getitem__, reverse=True)
    return {
        "Goodput (share of the time in steps that count)": _percent(
            seconds["steps"] / total
        ),
        "Other time": ", ".join(f"{k} {_percent(others[k] / total)}" for k in names),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _or_empty(form: Any, value: float) -> str:
    return form(value) if math.isfinite(value) else ""


def _median(rows: Sequence[Json], name: str) -> float:
    values = column(rows, name)
    values = values[np.isfinite(values)]
    return statistics.median(values.tolist()) if len(values) else math.nan
