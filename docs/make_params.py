"""Writes the table of docs/params.md: run it when jaxlm/model/params.py changes."""

from pathlib import Path

from jaxlm.model.params import WEIGHTS

PAGE = Path(__file__).with_name("params.md")
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """The weights as a table in Markdown."""
    rows = ["| path | shape | role | present when |", "|---|---|---|---|"]
    for weight in WEIGHTS:
        letters = " ".join(weight.dimensions)
        row = (f"`{weight.path}`", letters, weight.role.value, weight.present.words)
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE} has no marks around its table"
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
