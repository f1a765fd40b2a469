"""docs/reliability.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"


def rows():
    """Yields the fault and the tests of each row of a table of faults."""
    table = False
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        table = line.startswith("|") and (table or cells[-1] == "Test")
        if table and cells[-1] != "Test" and not line.startswith("|-"):
            yield cells[0], cells[-1]


def words(text):
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def named(cell):
    """Yields each file of tests, with the words that tell which of its tests."""
    at = [*re.finditer(r"`([\w/.]+)`", cell)]
    for match, after in zip(at, [*(m.start() for m in at[1:]), len(cell)], strict=True):
        name = match[1]
        path = TESTS.parent / name if "/" in name else TESTS / "faults" / name
        said = cell[match.end() : after].strip(" ;,")
        yield path, [words(p) for p in said.lstrip(": ").split(",") if words(p)]


def test_each_row_names_tests_that_exist():
    wrong = []
    for fault, cell in rows():
        tests = list(named(cell))
        if not tests:
            wrong.append(f"{fault}: no test")
        for path, phrases in tests:
            files = [path] if path.is_file() else sorted(path.glob("test_*.py"))
            text = words(" ".join(file.read_text() for file in files))
            if not files:
                wrong.append(f"{fault}: there is no {path}")
            wrong += [f"{fault}: {p}, not in {path}" for p in phrases if p not in text]
    assert not wrong and len(list(rows())) > 80
