"""`report.html`: a single file that shows or compares runs, without a network."""

import html
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxlm.fields import named_values
from jaxlm.files.beginnings import PAGE
from jaxlm.files.durable import replacing
from jaxlm.report.curves import (
    MAX_POINTS,
    Json,
    Run,
    bucket_means,
    column,
    downsample,
    figures,
)

# Limits: samples per run, characters per sample.
MAX_SAMPLES = 200
MAX_CHARACTERS = 20_000

# Name of a curve, as in page.js -> kind of row and field.
CURVES = {
    "train": ("train", "loss"),
    "eval": ("eval", "loss"),
    "lr": ("train", "lr"),
    "grad_norm": ("train", "grad_norm"),
    "tokens_per_s": ("train", "tokens_per_s"),
    "mfu": ("train", "mfu"),
    "expert_load": ("train", "expert_load"),
    "entropy": ("look", "entropy"),
    "lens_depth": ("look", "lens_depth"),
    "previous": ("look", "previous"),
    "induction": ("look", "induction"),
    "memory": ("look", "memory"),
}


def write_report(
    runs: Sequence[Run], out: Path | str, *, next_s: float | None = None
) -> Path:
    """Writes the report of `runs` to the file `out`, and returns its path.

    Args:
      runs: one run, or several, to compare them.
      next_s: seconds until the next report of a run in progress: the page reloads
        itself then, and ever more rarely if none comes. None: it does not.

    Raises:
      OSError: if `out` cannot be written; a report that was there is left as it was.
    """
    names = ", ".join(run.name for run in runs)
    tables = [figures(run) for run in runs]
    data: Json = {"runs": [_run_data(run) for run in runs]}
    if next_s is not None:
        data["live"] = {"written_s": round(time.time(), 3), "next_s": next_s}
    page = {
        "title": html.escape(f"{names}: training report"),
        "style": asset("page.css"),
        "script": asset("drawing.js") + asset("page.js"),
        "heading": html.escape(names),
        "status": _status(runs, tables[0]["Steps"]),
        "tiles": _tiles(tables[0]) if len(runs) == 1 else "",
        "figures": _figures_table(runs, tables),
        "held_out": _held_out_table(runs),
        "config": _config_table(runs),
        "held_out_hidden": _hidden_unless(any(run.of_kind("eval") for run in runs)),
        "config_hidden": _hidden_unless(any(run.config for run in runs)),
        "data": script_json(data),
    }
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, PAGE) as file:
        file.write(fill(asset("page.html"), page).encode("utf-8", "backslashreplace"))
    return out


def asset(name: str) -> str:
    """Returns the text of a file beside this one."""
    return resources.files("jaxlm.report").joinpath(name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Returns a template with its `{{names}}` replaced by values, which are HTML."""
    # In one pass, so that inserted text that looks like a placeholder stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _status(runs: Sequence[Run], steps: str) -> str:
    if len(runs) > 1:
        return f"Comparison of {len(runs)} training runs."
    return f"Training run, {html.escape(steps)} steps done."


def _hidden_unless(shown: bool) -> str:
    return "" if shown else " hidden"


def script_json(value: Any) -> str:
    """Encodes JSON for a <script> element: nothing in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _numbers(values: Float[np.ndarray, " n"]) -> list[float | None]:
    """Rounds to seven digits; None if not finite."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values.tolist()]


def _curve(
    positions: Float[np.ndarray, "3 n"],
    indices: Int[np.ndarray, " m"],
    values: Float[np.ndarray, " m"],
) -> Json:
    step, tokens, seconds = (_numbers(p[indices]) for p in positions)
    return {"step": step, "tokens": tokens, "time": seconds, "y": _numbers(values)}


def _run_data(run: Run) -> Json:
    trains = run.of_kind("train")
    axes = np.stack([column(trains, n) for n in ("step", "tokens", "wall_s")])
    # Tokens and seconds are interpolated for held-out rows and gaps in training rows.
    known = np.isfinite(axes).all(axis=0)
    track = np.concatenate([np.zeros((3, 1)), axes[:, known]], axis=1)
    curves = {}
    for curve, (kind, field) in CURVES.items():
        rows = run.of_kind(kind)
        values, steps = column(rows, field), column(rows, "step")
        if kind != "eval" and curve != "train" and not np.isfinite(values).any():
            continue
        positions = np.stack(
            [steps, *(np.interp(steps, track[0], track[i]) for i in (1, 2))]
        )
        kept = downsample(values, MAX_POINTS)
        curves[curve] = _curve(positions, kept, values[kept])
        if len(kept) < len(values):
            # The kept extremes do not give the mean.
            middles, means = bucket_means(values, MAX_POINTS // 3)
            curves[curve]["mean"] = _curve(positions, middles, means)
    samples = run.of_kind("sample")
    chosen = np.unique(np.linspace(0, len(samples) - 1, MAX_SAMPLES).astype(int))
    return {
        "name": run.name,
        "curves": curves,
        "samples": [_sample(samples[i]) for i in chosen] if samples else [],
        "omitted": len(samples) - len(chosen) if samples else 0,
    }


def _sample(row: Json) -> Json:
    text = str(row.get("text", ""))
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS] + f" [… {len(text) - MAX_CHARACTERS} more]"
    prompt = str(row.get("prompt", ""))[-MAX_CHARACTERS:]
    return {"step": row["step"], "prompt": prompt, "text": text}


def _row(cells: Sequence[str], tag: str = "td", mark: bool = False) -> str:
    first, *rest = (html.escape(cell) for cell in cells)
    attribute = ' class="differs"' if mark else ""
    body = "".join(f"<{tag}>{cell}</{tag}>" for cell in rest)
    scope = "col" if tag == "th" else "row"
    return f'<tr{attribute}><th scope="{scope}">{first}</th>{body}</tr>\n'


def _tiles(table: dict[str, str]) -> str:
    """Renders the most important figures as tiles in large type."""
    tiles = ""
    labels = ("Held-out loss", "Train loss", "Bits per byte", "Parameters")
    for label in (*labels, "Tokens seen", "Training time"):
        value = next(v for k, v in table.items() if k.startswith(label))
        value = html.escape(value.removesuffix(" in matmuls"))
        if value:
            tiles += f"<div><dt>{label}</dt><dd>{value}</dd></div>\n"
    return tiles


def _figures_table(runs: Sequence[Run], tables: Sequence[dict[str, str]]) -> str:
    rows = _row(["Run", *(run.name for run in runs)], "th")
    for label in tables[0]:
        cells = [table[label] for table in tables]
        if any(cells):
            rows += _row([label, *(cell or "–" for cell in cells)])
    return rows


def _held_out_table(runs: Sequence[Run], limit: int = 500) -> str:
    """Renders the held-out loss of the last `limit` evaluated steps."""
    losses = [{r["step"]: r.get("loss") for r in run.of_kind("eval")} for run in runs]
    rows = _row(["Step", *(run.name for run in runs)], "th")
    steps = sorted(set().union(*losses))
    if more := steps[:-limit]:
        rows += _row([f"{len(more)} earlier ones are left out", *("–" for _ in runs)])
    for step in steps[-limit:]:
        values = [found.get(step) for found in losses]
        cells = ["–" if v is None else f"{v:.4f}" for v in values]
        rows += _row([str(step), *cells])
    return rows


def _config_table(runs: Sequence[Run]) -> str:
    fields = [named_values(run.config) for run in runs]
    rows = _row(["Field", *(run.name for run in runs)], "th")
    for name in dict.fromkeys(name for f in fields for name in f):
        cells = [
            json.dumps(f[name], ensure_ascii=False) if name in f else "–"
            for f in fields
        ]
        rows += _row([name, *cells], mark=len(set(cells)) > 1)
    return rows
