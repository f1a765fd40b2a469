"""Plot one run, or compare several: an HTML page and a PNG."""

from pathlib import Path

from jaxlm.commands.arguments import ReportArguments
from jaxlm.report.live import PICTURE, REPORT
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png


def main(chosen: ReportArguments) -> int:
    """Writes the two files and prints their paths; returns the exit code."""
    runs, out = chosen.runs, chosen.out
    if out is None and len(runs) == 1:
        page, picture = runs[0] / REPORT, runs[0] / PICTURE
    else:
        page = out or Path("comparison.html")
        picture = page.with_suffix(".png")
    print(write_report(runs, page))
    print(draw_loss_png(runs, picture))
    return 0
