"""The rows that `jaxlm verify` reports, and their table."""

import dataclasses
import math
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
    """Formats the rows in columns, with notes below their rows."""
    verdicts = {True: "passed", False: "FAILED", None: "not checked"}
    rows = [("", "measured", "gate", "")]
    rows += [(c.name, c.measured, c.gate, verdicts[c.passed]) for c in checks]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    notes = ["", *(c.note for c in checks)]
    lines = []
    for row, note in zip(rows, notes, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
        if note:
            lines.append(f"  ({note})")
    return "\n".join(lines)


def at_most(name: str, value: float, limit: float, note: str = "") -> Check:
    """Makes the row of a number that passes up to a limit; NaN does not pass."""
    return Check(name, number(value), number(limit), value <= limit, note, value)


def number(x: Any) -> str:
    """Formats a small number for comparison: 2.7e-05, 0."""
    return "0" if x == 0 else f"{float(x):.1e}"
