"""`loss.png`: plots the losses of one run or several."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxlm.files.beginnings import PICTURE
from jaxlm.files.durable import replacing
from jaxlm.report.curves import (
    MAX_POINTS,
    SMOOTHING,
    Run,
    column,
    downsample,
    final_losses,
    smoothed_loss,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Based on Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0508a", "#8a6d00", "#3a3f8f")
NOT_FINITE, FAINT, GRID = "#b3261e", "#5c6570", "#e0e4e9"
MAX_LEGEND_ROWS = 10
# Losses that span more than this factor get a logarithmic axis.
LOG_SPAN = 20


def draw_loss_png(runs: Sequence[Run], out: Path | str) -> Path:
    """Plots train and held-out loss over steps, 1200 x 750 pixels, and returns `out`.

    Red triangles on the axis mark training losses that are not finite. The vertical
    axis is logarithmic if the losses span more than a factor of 20.

    Raises:
      OSError: if `out` cannot be written; a picture that was there is left as it was.
    """
    figure = draw_losses(runs)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, PICTURE) as file:
        figure.savefig(file, format="png")
    return out


def draw_losses(runs: Sequence[Run]) -> "Figure":
    """Plots the losses of all runs in one matplotlib figure."""
    # The import takes a third of a second, so it waits until something is drawn.
    # Without a home folder it would warn that it keeps no list of fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        colors = [COLORS[number % len(COLORS)]] * 2 if len(runs) > 1 else COLORS[:2]
        _draw_run(axes, run, *colors)
    _set_axes(axes, runs)
    rows = _add_legend(axes, runs)
    figure.subplots_adjust(0.07, 0.09, 0.97, 0.9 - 0.033 * rows)
    return figure


def _draw_run(axes: "Axes", run: Run, train_color: str, eval_color: str) -> None:
    rows = run.of_kind("train")
    steps, losses = column(rows, "step"), column(rows, "loss")
    bad = steps[~np.isfinite(losses)]
    axes.plot(
        *(bad, np.zeros_like(bad), "^"),
        color=NOT_FINITE,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
        zorder=3,
    )
    if len(losses) >= SMOOTHING:
        kept = downsample(losses, 2 * MAX_POINTS)
        _plot(axes, steps[kept], losses[kept], train_color, linewidth=0.8, alpha=0.35)
    indices, means = smoothed_loss(losses)
    _plot(axes, steps[indices], means, train_color, linewidth=2.2)
    rows = run.of_kind("eval")
    steps, losses = column(rows, "step"), column(rows, "loss")
    style: dict[str, Any] = {}
    if len(rows) <= 60:
        style = {"marker": "o", "markerfacecolor": "white"}
    axes.plot(
        steps, _finite(losses), color=eval_color, linewidth=1.2, clip_on=False, **style
    )


def _finite(losses: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Replaces non-finite losses by NaN, where matplotlib breaks the line."""
    return np.where(np.isfinite(losses), losses, np.nan)


def _plot(
    axes: "Axes",
    steps: Float[np.ndarray, " n"],
    losses: Float[np.ndarray, " n"],
    color: str,
    **style: Any,
) -> None:
    """Draws a line through the finite losses; one without finite neighbors is a dot."""
    edges = np.pad(np.isfinite(losses), 1)
    alone = np.flatnonzero(edges[1:-1] & ~edges[:-2] & ~edges[2:])
    axes.plot(
        *(steps, _finite(losses)),
        color=color,
        marker=".",
        markersize=9,
        markevery=alone.tolist(),
        **style,
    )


def _set_axes(axes: "Axes", runs: Sequence[Run]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    rows = [r for run in runs for kind in ("train", "eval") for r in run.of_kind(kind)]
    losses, steps = column(rows, "loss"), column(rows, "step")
    losses = losses[np.isfinite(losses)]
    axes.margins(x=0, y=0.04)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    if not len(losses):
        axes.set(xlim=(0, 1), ylim=(0, 1))
        middle = {"x": 0.5, "y": 0.5, "ha": "center", "backgroundcolor": "white"}
        axes.text(s="no finite loss yet", color=FAINT, fontsize=12, **middle)
    elif 0 < steps.min() < 0.1 * steps.max():
        axes.set_xlim(0, steps.max())
    if len(steps) and steps.max() >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(losses) and 0 < losses.min() < losses.max() / LOG_SPAN:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("step", color=FAINT, fontsize=12)
    axes.set_ylabel("loss (nats per token)", color=FAINT, fontsize=12)
    axes.tick_params(labelsize=12, labelcolor=FAINT, color=FAINT, left=False)
    axes.grid(axis="y", color=GRID)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _add_legend(axes: "Axes", runs: Sequence[Run]) -> int:
    """Adds names and last losses above the axes; returns its number of rows."""
    from matplotlib.lines import Line2D

    train = {"linewidth": 2.2}
    held_out = {"linewidth": 1.2, "marker": "o", "markerfacecolor": "white"}
    last = [
        ["-" if loss is None else f"{loss:.3f}" for loss in final_losses(run)]
        for run in runs
    ]
    if len(runs) == 1:
        entries = [
            (f"train {last[0][0]}", {"color": COLORS[0], **train}),
            (f"held-out {last[0][1]}", {"color": COLORS[1], **held_out}),
        ]
    else:
        entries = []
        for number, run in enumerate(runs[:MAX_LEGEND_ROWS]):
            losses = "train {}, held-out {}".format(*last[number])
            style = {"color": COLORS[number % len(COLORS)], **train}
            entries.append((f"{_drawable(run.name, 48)}: {losses}", style))
        if len(runs) > MAX_LEGEND_ROWS:
            more = len(runs) - MAX_LEGEND_ROWS
            entries.append((f"and {more} more", {"linestyle": "none"}))
        entries.append(("held-out", {"color": FAINT, **held_out}))
    legend = axes.legend(
        [Line2D([], [], **style) for _, style in entries],
        [text for text, _ in entries],
        title=_drawable(", ".join(run.name for run in runs), 70),
        title_fontsize=20,
        fontsize=12,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        borderaxespad=0,
        borderpad=0,
        ncols=2 if len(runs) == 1 else 1,
        alignment="left",
        frameon=False,
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)  # names may contain dollar signs
    return 1 if len(runs) == 1 else len(entries)


def _drawable(text: str, length: int) -> str:
    """Returns the end of a text, with U+FFFD for characters that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    text = text if len(text) <= length else "…" + text[1 - length :]
    return "".join(c if ord(c) in known else "\N{REPLACEMENT CHARACTER}" for c in text)
