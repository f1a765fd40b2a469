"""Plot one run, or compare several: an HTML page and a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.flags import Positional, parse
from jaxlm.report.curves import load_runs
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png


@dataclass(frozen=True)
class Arguments:
    """Plot one run, or compare several: an HTML page and a PNG."""

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders."""
    out: Path | None = None
    """HTML file; None: report.html in the run, or comparison.html for several."""


def main(arguments: Sequence[str], prog: str) -> int:
    """`RUN ... [--out FILE]`: writes the two files and prints their paths."""
    chosen = parse(Arguments, arguments, prog=prog)
    runs, out = chosen.runs, chosen.out
    if not runs:
        raise ValueError("name at least one run folder")
    load_runs(runs)
    if out is None:
        out = runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html")
    picture = out.with_suffix(".png")
    if chosen.out is None and len(runs) == 1:
        picture = runs[0] / "loss.png"
    print(write_report(runs, out))
    print(draw_loss_png(runs, picture))
    return 0
