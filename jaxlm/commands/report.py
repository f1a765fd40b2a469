"""Plot one run, or compare several: an HTML page and a PNG."""

from jaxlm.flags.arguments import ReportArguments
from jaxlm.report.curves import load_runs
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png


def main(chosen: ReportArguments) -> int:
    """Writes the two files and prints their paths; returns the exit code."""
    page, picture = chosen.files()
    runs = load_runs(chosen.runs)
    print(write_report(runs, page))
    print(draw_loss_png(runs, picture))
    return 0
