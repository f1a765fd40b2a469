"""`loss.png`: the losses of a run, or of several, as a picture."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from jaxlm.report.curves import (
    Run,
    column,
    downsample,
    final_losses,
    load_runs,
    smooth,
    stretch_means,
)

WIDTH, HEIGHT = 1200, 750
LEFT, RIGHT, TOP, BOTTOM = 84, 1168, 92, 684
LEGEND_TOP, LEGEND_ROW, MAX_LEGEND_ROWS = 66, 22, 10
SCALE = 3  # lines are drawn this much larger and then shrunk, which smooths them

INK, FAINT, GRID = (27, 31, 36), (92, 101, 112), (224, 228, 233)
BAD = (179, 38, 30)
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (176, 80, 138),
    (138, 109, 0),
    (58, 63, 143),
)

Colour = tuple[int, int, int]
Number = float | int  # a type checker that runs does not take whole numbers for float


@dataclass(frozen=True)
class _Frame:
    """What part of the plane the picture shows."""

    x0: Number
    x1: Number
    y0: Number
    y1: Number
    log: bool
    top: Number
    """Pixel row of y1: below the legend, which has a row for each run."""

    def x(self, step: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Pixel of a step."""
        return LEFT + (step - self.x0) / (self.x1 - self.x0) * (RIGHT - LEFT)

    def y(self, loss: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Pixel of a loss."""
        low, high = self.y0, self.y1
        if self.log:
            loss, low, high = np.log(loss), math.log(low), math.log(high)
        return BOTTOM - (loss - low) / (high - low) * (BOTTOM - self.top)


@dataclass(frozen=True)
class _Entry:
    """A line of the legend."""

    x: Number
    row: int
    colour: Colour
    held_out: bool
    text: str

    @property
    def y(self) -> Number:
        """Pixel row of its middle."""
        return LEGEND_TOP + LEGEND_ROW * self.row


def draw_loss_png(runs: Path | str | Iterable[Path | str], out: Path | str) -> Path:
    """Draws train and held-out loss over steps, 1200 x 750 pixels, and returns `out`.

    Red triangles on the axis mark training losses that are not finite. The vertical
    axis is logarithmic where the losses span more than a factor of 20.

    Raises:
      ValueError: for a folder without metrics or a file that cannot be understood.
    """
    loaded = load_runs([runs] if isinstance(runs, str | Path) else runs)
    frame = _frame(loaded)
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw = ImageDraw.Draw(image)
    x_ticks = _ticks(frame.x0, frame.x1, 8)
    y_ticks = _log_ticks(frame) if frame.log else _ticks(frame.y0, frame.y1, 7)
    for loss in y_ticks:
        y = float(frame.y(np.array([loss]))[0])
        _line(draw, [(LEFT, y), (RIGHT, y)], GRID, 1)
    for step in x_ticks:
        x = float(frame.x(np.array([step]))[0])
        _line(draw, [(x, BOTTOM), (x, BOTTOM + 5)], FAINT, 1)
    _line(draw, [(LEFT, BOTTOM), (RIGHT, BOTTOM)], FAINT, 1)
    for number, run in enumerate(loaded):
        _draw_run(draw, run, frame, number, several=len(loaded) > 1)
    _legend(draw, loaded)
    image = image.reduce(SCALE)
    _write_words(image, loaded, frame, x_ticks, y_ticks)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out, "PNG", compress_level=6)
    return out


def _frame(runs: Sequence[Run]) -> _Frame:
    top = TOP + LEGEND_ROW * (min(len(runs), MAX_LEGEND_ROWS + 1) - 1)
    rows = [r for run in runs for kind in ("train", "eval") for r in run.of_kind(kind)]
    losses, steps = column(rows, "loss"), column(rows, "step")
    losses = losses[np.isfinite(losses)]
    x1 = float(steps.max()) if len(steps) else 1.0
    x0 = float(steps.min()) if len(steps) else 0.0
    x0 = 0.0 if x0 < 0.1 * x1 else x0
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    if not len(losses):
        return _Frame(x0, x1, 0.0, 1.0, False, top)
    low, high = float(losses.min()), float(losses.max())
    log = low > 0 and high / low > 20
    if low == high:
        return _Frame(x0, x1, low - 0.1 * (abs(low) or 1), high + 0.1, False, top)
    if log:
        margin = (high / low) ** 0.04
        return _Frame(x0, x1, low / margin, high * margin, True, top)
    margin = 0.04 * (high - low)
    return _Frame(x0, x1, low - margin, high + margin, False, top)


def _ticks(low: Number, high: Number, wanted: int) -> list[float]:
    """Round numbers between `low` and `high`, about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(frame: _Frame) -> list[float]:
    decades = math.log10(frame.y1 / frame.y0)
    parts = (1,) if decades > 5 else (1, 2, 5)
    exponents = range(
        math.floor(math.log10(frame.y0)), math.ceil(math.log10(frame.y1)) + 1
    )
    found = [float(f"{m}e{e}") for e in exponents for m in parts]
    return [v for v in found if frame.y0 <= v <= frame.y1]


def _light(colour: Colour, share: float = 0.35) -> Colour:
    """A colour mixed with the white of the ground."""
    r, g, b = (round(255 + share * (c - 255)) for c in colour)
    return r, g, b


def _line(
    draw: ImageDraw.ImageDraw,
    points: Sequence[tuple[Number, Number]],
    colour: Colour,
    width: Number,
) -> None:
    scaled = [(x * SCALE, y * SCALE) for x, y in points]
    draw.line(scaled, fill=colour, width=round(width * SCALE), joint="curve")


def _dot(draw: ImageDraw.ImageDraw, x: Number, y: Number, colour: Colour) -> None:
    """A ring, as held-out losses are marked."""
    draw.circle((x * SCALE, y * SCALE), 5 * SCALE, fill=colour)
    draw.circle((x * SCALE, y * SCALE), 2.5 * SCALE, fill="white")


def _plot(
    draw: ImageDraw.ImageDraw,
    frame: _Frame,
    steps: Float[np.ndarray, " n"],
    losses: Float[np.ndarray, " n"],
    colour: Colour,
    width: Number,
) -> None:
    """A line through the finite losses, broken where one is not."""
    finite = np.flatnonzero(np.isfinite(losses))
    for part in np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1):
        xs, ys = frame.x(steps[part]).tolist(), frame.y(losses[part]).tolist()
        if len(part) == 1:  # a lone value is a dash, or it could not be seen
            xs, ys = [xs[0] - width, xs[0] + width], ys * 2
        if len(part):
            _line(draw, list(zip(xs, ys, strict=True)), colour, width)


def _colours(number: int, several: bool) -> tuple[Colour, Colour]:
    """Colours of train and held-out loss."""
    if not several:
        return COLOURS[0], COLOURS[1]
    return COLOURS[number % len(COLOURS)], COLOURS[number % len(COLOURS)]


def _draw_run(
    draw: ImageDraw.ImageDraw, run: Run, frame: _Frame, number: int, several: bool
) -> None:
    train_colour, eval_colour = _colours(number, several)
    trains, evals = run.of_kind("train"), run.of_kind("eval")
    steps, losses = column(trains, "step"), column(trains, "loss")
    for x in frame.x(steps[~np.isfinite(losses)]):
        corners = [(x, BOTTOM - 10), (x + 5, BOTTOM - 1), (x - 5, BOTTOM - 1)]
        draw.polygon([(a * SCALE, b * SCALE) for a, b in corners], fill=BAD)
    kept = downsample(losses, 4000)
    _plot(draw, frame, steps[kept], losses[kept], _light(train_colour), 1)
    if len(losses) > 10:
        line = smooth(losses, math.ceil(len(losses) / 50))
        middles, line = stretch_means(line, 1000)
        _plot(draw, frame, steps[middles], line, train_colour, 2.5)
    else:
        _plot(draw, frame, steps, losses, train_colour, 2.5)
    steps, losses = column(evals, "step"), column(evals, "loss")
    _plot(draw, frame, steps, losses, eval_colour, 1.5)
    if len(losses) <= 60:
        for x, y in zip(frame.x(steps), frame.y(losses), strict=True):
            if math.isfinite(y):
                _dot(draw, float(x), float(y), eval_colour)


def _legend_entries(runs: Sequence[Run]) -> list[_Entry]:
    """One row a run; of a single run train and held-out loss stand side by side."""
    if len(runs) == 1:
        train, held_out = (_loss(value) for value in final_losses(runs[0]))
        return [
            _Entry(LEFT, 0, COLOURS[0], False, f"train {train}"),
            _Entry(LEFT + 180, 0, COLOURS[1], True, f"held-out {held_out}"),
        ]
    entries = []
    for row, run in enumerate(runs[:MAX_LEGEND_ROWS]):
        train, held_out = (_loss(value) for value in final_losses(run))
        colour = _colours(row, several=True)[0]
        words = f"{_cut(run.name, 48)}: train {train}, held-out {held_out}"
        entries.append(_Entry(LEFT, row, colour, False, words))
    if len(runs) > MAX_LEGEND_ROWS:
        words = f"and {len(runs) - MAX_LEGEND_ROWS} more"
        entries.append(_Entry(LEFT, MAX_LEGEND_ROWS, GRID, False, words))
    entries.append(_Entry(RIGHT - 120, 0, FAINT, True, "held-out"))
    return entries


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _legend(draw: ImageDraw.ImageDraw, runs: Sequence[Run]) -> None:
    for entry in _legend_entries(runs):
        x, y = entry.x, entry.y
        width = 1.5 if entry.held_out else 2.5
        _line(draw, [(x, y), (x + 32, y)], entry.colour, width)
        if entry.held_out:
            _dot(draw, x + 16, y, entry.colour)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _write_words(
    image: Image.Image,
    runs: Sequence[Run],
    frame: _Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
) -> None:
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(16), ImageFont.load_default(26)
    title = ", ".join(run.name for run in runs)
    draw.text((LEFT, 18), _cut(title, 70), INK, large)
    for step in x_ticks:
        text = f"{step / 1000:g}k" if frame.x1 >= 10_000 else f"{step:g}"
        x = float(frame.x(np.array([step]))[0])
        draw.text((x, BOTTOM + 10), text, FAINT, small, anchor="ma")
    for loss in y_ticks:
        y = float(frame.y(np.array([loss]))[0])
        draw.text((LEFT - 10, y), f"{loss:g}", FAINT, small, anchor="rm")
    draw.text(((LEFT + RIGHT) / 2, HEIGHT - 16), "step", FAINT, small, anchor="ms")
    side = Image.new("RGB", (260, 24), "white")
    ImageDraw.Draw(side).text((130, 12), "loss (nats per token)", FAINT, small, "mm")
    side = side.rotate(90, expand=True)
    image.paste(side, (8, (round(frame.top) + BOTTOM - side.height) // 2))
    if not any(np.isfinite(column(run.rows, "loss")).any() for run in runs):
        middle = ((LEFT + RIGHT) / 2, (frame.top + BOTTOM) / 2)
        draw.text(middle, "no finite loss yet", FAINT, small, anchor="mm")
    for entry in _legend_entries(runs):
        draw.text((entry.x + 42, entry.y), entry.text, INK, small, anchor="lm")
