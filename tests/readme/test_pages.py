"""The files and names that the pages mention exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
# `VERB.py`: a name that the reader puts in.
PLACEHOLDER = re.compile(r"\b(NAME|VERB)\b|_(NAME|VERB)\b")
FILES = [
    f"/{path.relative_to(ROOT)}"
    for folder in ("jaxlm", "tests", "benchmarks", "configs", "docs", ".ci", ".github")
    for path in (ROOT / folder).rglob("*")
]
FILES += [f"/{path.name}" for path in ROOT.iterdir()]


def missing_files(text: str) -> list[str]:
    """Paths in backticks that are the end of no path in the repository."""
    folders = r"(?:jaxlm|tests|benchmarks|configs|docs|\.ci|\.github)/[\w./-]+"
    named = re.findall(rf"`({folders}|[\w./-]+\.py)`", text)
    ends = {name.rstrip("/") for name in named if not PLACEHOLDER.search(name)}
    return sorted(e for e in ends if not any(f.endswith(f"/{e}") for f in FILES))


def missing_names(text: str) -> list[str]:
    """Dotted names below `jaxlm` that cannot be imported."""
    return sorted(
        name
        for name in set(re.findall(r"(?:`|::: )(jaxlm(?:\.\w+)+)", text))
        if not exists(name)
    )


def exists(name: str) -> bool:
    module, *attributes = name.split(".")
    value = importlib.import_module(module)
    for attribute in attributes:
        if not hasattr(value, attribute):
            try:
                value = importlib.import_module(f"{value.__name__}.{attribute}")
            except (ImportError, AttributeError):
                return False
        else:
            value = getattr(value, attribute)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    assert missing_files(text) == []
    assert missing_names(text) == []


def test_the_check_sees_what_is_missing():
    text = "`jaxlm/ops/nope.py` `rope.py` `jaxlm.ops.rope.nope` `jaxlm.ops.rope.rotate`"
    assert missing_files(text) == ["jaxlm/ops/nope.py"]
    assert missing_names(text) == ["jaxlm.ops.rope.nope"]
