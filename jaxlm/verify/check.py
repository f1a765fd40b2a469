"""A row of what `jaxlm verify` finds, and the table of all rows."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One property that was checked."""

    name: str
    """What was compared."""
    measured: str
    """What was found, for a person."""
    gate: str
    """What it must keep to, for a person."""
    passed: bool | None
    """None: it was not checked."""
    note: str = ""
    """A remark, for a person."""
    value: float | None = None
    """What was found, where it is a number."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        if self.value is not None and not math.isfinite(self.value):
            values["value"] = None  # JSON has no such number; `measured` has it.
        return values


def table(checks: Sequence[Check]) -> str:
    """The rows in columns, notes below their rows."""
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


def number(x: Any) -> str:
    """A small number as people compare it: 2.7e-05, 0."""
    return "0" if x == 0 else f"{float(x):.1e}"
