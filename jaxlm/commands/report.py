"""Plot one run, or compare several: an HTML page and a PNG."""

from jaxlm.flags.arguments import COMPARISON, ReportArguments
from jaxlm.report.curves import load_runs
from jaxlm.report.live import PICTURE, REPORT
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png


def main(chosen: ReportArguments) -> int:
    """Writes the two files and prints their paths; returns the exit code."""
    folders, out = chosen.runs, chosen.out
    if out is None and len(folders) == 1:
        page, picture = folders[0] / REPORT, folders[0] / PICTURE
    else:
        page = out or COMPARISON
        picture = page.with_suffix(".png")
    runs = load_runs(folders)
    print(write_report(runs, page))
    print(draw_loss_png(runs, picture))
    return 0
