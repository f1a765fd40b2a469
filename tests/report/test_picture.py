"""loss.png: its lines, axes and names."""

import math
import os
import struct

import numpy as np
import pytest
from matplotlib.colors import to_hex
from report_case import make_run

from jaxlm.report.curves import figures, load_runs
from jaxlm.report.picture import COLORS, MAX_LEGEND_ROWS, draw_loss_png, draw_losses


def axes_of(*folders):
    (axes,) = draw_losses(load_runs(folders)).axes
    return axes


def points(axes, color, *, marker):
    """Points [n, 2] of the only full-width line with this color and marker."""
    (line,) = [
        line
        for line in axes.get_lines()
        if to_hex(line.get_color()) == color
        and line.get_marker() == marker
        and line.get_alpha() is None
    ]
    return line.get_xydata()


def words(axes):
    legend = axes.get_legend()
    return [text.get_text() for text in (legend.get_title(), *legend.get_texts())]


@pytest.mark.parametrize(
    "losses", [[], [2.0], [math.nan], [2.0, math.inf, math.nan, 1.0]]
)
def test_few_and_non_finite_rows(tmp_path, losses):
    run = make_run(tmp_path / "run", losses)
    out = draw_loss_png(load_runs(run), tmp_path / "new" / "loss.png")
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1200, 750)
    assert os.listdir(out.parent) == ["loss.png"]
    axes = axes_of(run)
    bad = [10.0 * i for i, v in enumerate(losses, start=1) if not math.isfinite(v)]
    assert points(axes, "#b3261e", marker="^")[:, 0].tolist() == bad
    drawn = points(axes, COLORS[0], marker=".")[:, 1]
    finite = np.isfinite(losses)
    assert drawn[finite].tolist() == np.array(losses)[finite].tolist()
    assert np.isnan(drawn[~finite]).all()
    shown = [text.get_text() for text in axes.texts]
    assert shown == ([] if finite.any() else ["no finite loss yet"])


def test_the_curves_of_one_run(tmp_path):
    losses = np.linspace(3.98, 2.0, 100)  # at steps 10, 20 .. 1000
    run = make_run(tmp_path / "run", losses, evals=[(500, 3.5), (1000, 3.0)])
    axes = axes_of(run)
    line = points(axes, COLORS[0], marker=".")
    assert line[:, 0].tolist() == list(range(10, 1001, 10))
    np.testing.assert_allclose(line[:96, 1], losses[:96], rtol=1e-12)  # smoothed
    assert line[-1, 1] == pytest.approx(2.03)
    assert points(axes, COLORS[1], marker="o").tolist() == [[500, 3.5], [1000, 3.0]]
    assert axes.get_xlim() == (0, 1000)
    low, high = axes.get_ylim()
    assert 1.8 < low < 2.0 and 3.98 < high < 4.2
    assert words(axes) == ["run", "train 2.030", "held-out 3.000"]


@pytest.mark.parametrize("rows", [1, 2, 49, 50, 2400])
def test_the_legend_says_where_the_curve_ends(tmp_path, rows):
    noise = np.random.default_rng(rows).normal(size=rows)
    run = make_run(tmp_path / "run", 4 - np.linspace(0, 2, rows) + 0.2 * noise)
    axes = axes_of(run)
    end = points(axes, COLORS[0], marker=".")[-1, 1]
    assert words(axes)[1] == f"train {end:.3f}"
    table = figures(load_runs([run])[0])
    figure = table["Train loss (nats per token, end of the smoothed curve)"]
    assert figure == f"{end:.4f}"


def test_a_loss_between_gaps_is_a_dot(tmp_path):
    axes = axes_of(make_run(tmp_path / "run", [3.0, math.nan, 2.5, math.inf, 2.0, 1.9]))
    (line,) = (line for line in axes.get_lines() if line.get_marker() == ".")
    assert line.get_markevery() == [0, 2]


def test_several_runs_have_a_colour_each(tmp_path):
    count = MAX_LEGEND_ROWS + 2
    runs = [make_run(tmp_path / f"r{i}", [3.0 + i, 2.0 + i]) for i in range(count)]
    axes = axes_of(*runs[:3])
    for number in range(3):
        line = points(axes, COLORS[number], marker=".")
        assert line.tolist() == [[10, 3.0 + number], [20, 2.0 + number]]
    assert words(axes) == [
        "r0, r1, r2",
        "r0: train 2.000, held-out -",
        "r1: train 3.000, held-out -",
        "r2: train 4.000, held-out -",
        "held-out",
    ]
    assert words(axes_of(*runs))[-2:] == ["and 2 more", "held-out"]


def test_names_are_drawn_as_they_are(tmp_path):
    run = make_run(tmp_path / "costs $5 or 6$ \udcff\n日", [2.0])
    axes = axes_of(run)
    assert words(axes)[0] == "costs $5 or 6$ ���"
    assert not axes.get_legend().get_title().get_parse_math()
    draw_loss_png(load_runs(run), tmp_path / "loss.png")


def test_a_wide_span_of_losses_is_drawn_on_a_log_scale(tmp_path):
    assert axes_of(make_run(tmp_path / "a", [900.0, 2.0])).get_yscale() == "log"
    assert axes_of(make_run(tmp_path / "b", [4.0, 2.0])).get_yscale() == "linear"
    assert axes_of(make_run(tmp_path / "c", [900.0, -2.0])).get_yscale() == "linear"
