"""The rows that `jaxlm verify` reports, and their table."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One property that was checked: the result, the limit and a remark, as text."""

    name: str
    measured: str
    gate: str
    passed: bool | None
    """None: not checked."""
    note: str = ""
    value: float | None = None
    """The result, if it is a number."""

    def to_json(self) -> dict[str, Any]:
        """Converts the row to plain JSON values."""
        values = dataclasses.asdict(self)
        if self.value is not None and not math.isfinite(self.value):
            values["value"] = None  # JSON has no NaN; `measured` shows it.
        return values


def table(checks: Sequence[Check]) -> str:
    """Formats the rows in columns, of 80 characters with what `verify` measures.

    What follows a comma in `measured` is below the row, with the notes.
    """
    verdicts = {True: "passed", False: "FAILED", None: "not checked"}
    rows = [("", "measured", "gate", "")]
    parts = [c.measured.partition(", ") for c in checks]
    rows += [
        (c.name, head, c.gate, verdicts[c.passed])
        for c, (head, _, _) in zip(checks, parts, strict=True)
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    notes = [""]
    for check, (_, _, rest) in zip(checks, parts, strict=True):
        notes.append("; ".join(filter(None, (rest, check.note))))
    lines = []
    for row, note in zip(rows, notes, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
        if note:
            lines += textwrap.wrap(
                f"({note})",
                80,
                initial_indent="  ",
                subsequent_indent="   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def at_most(name: str, value: float, limit: float, note: str = "") -> Check:
    """Makes the row of a number that passes up to a limit; NaN does not pass."""
    return Check(name, number(value), number(limit), value <= limit, note, value)


def number(x: Any) -> str:
    """Formats a small number for comparison: 2.7e-05, 0."""
    return "0" if x == 0 else f"{float(x):.1e}"
