"""The files and names that the pages mention exist."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import jaxlm
import jaxlm.interp
from jaxlm.flags.arguments import read_arguments
from jaxlm.ops.probing.sites import SITES

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


def training_commands(text: str) -> list[list[str]]:
    """The arguments of each `train.py` in the blocks of a page, with `$i` as 0."""
    blocks = "".join(re.findall(r"(?m)^```\n(.*?)^```", text, re.DOTALL))
    joined = blocks.replace("\\\n", " ").replace("$i", "0")
    lines = re.findall(r"\bpython train\.py ([^\n\"'&]*)", joined)
    return [shlex.split(line) for line in lines]


def test_the_commands_that_launch_runs_are_complete(monkeypatch):
    """Configs exist, flags too, and their values fit."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "launch.md").read_text()
    commands = training_commands(text)
    assert len(commands) >= 7
    # From the hub come the tokenizers that the configs name.
    installed = re.findall(r"install .*-e '\S*\[(.*)\]'", text)
    assert sorted(installed) == ["cuda,hub"] * 3 + ["tpu,hub"] * 2
    for command in commands:
        config, _ = read_arguments("train", [x for x in command if x != "..."], "x")
        for count in (config.processes.count, *dataclasses.astuple(config.mesh)):
            assert count is None or count > 0 or count == -1
    with pytest.raises(ValueError, match="barrier-minute"):
        read_arguments("train", ["--processes.barrier-minute=3"], "x")


def test_the_table_for_users_of_transformer_lens_names_what_exists():
    text = (ROOT / "docs/inside.md").read_text().split("## From TransformerLens\n")[1]
    known = {*SITES, *dir(jaxlm), *inspect.signature(jaxlm.forward).parameters, "trace"}
    for module in pkgutil.walk_packages(jaxlm.interp.__path__, "jaxlm.interp."):
        known |= set(dir(importlib.import_module(module.name)))
    rows = re.findall(r"^\|[^|]*\|(.*)\|$", text, re.MULTILINE)[2:]
    named = {
        re.match(r"\w+", c).group(0) for r in rows for c in re.findall("`(.+?)`", r)
    }
    assert len(named) > 30 and named <= known


def test_the_check_sees_what_is_missing():
    text = "`jaxlm/ops/nope.py` `rope.py` `jaxlm.ops.rope.nope` `jaxlm.ops.rope.rotate`"
    assert missing_files(text) == ["jaxlm/ops/nope.py"]
    assert missing_names(text) == ["jaxlm.ops.rope.nope"]
