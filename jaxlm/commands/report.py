"""Plot one run, or compare several: an HTML page and a PNG."""

from pathlib import Path

from jaxlm.commands.arguments import ReportArguments
from jaxlm.report.curves import load_runs
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png


def main(chosen: ReportArguments) -> int:
    """Writes the two files and prints their paths; returns the exit code."""
    runs, out = chosen.runs, chosen.out
    load_runs(runs)
    if out is None:
        out = runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html")
    picture = out.with_suffix(".png")
    if chosen.out is None and len(runs) == 1:
        picture = runs[0] / "loss.png"
    print(write_report(runs, out))
    print(draw_loss_png(runs, picture))
    return 0
