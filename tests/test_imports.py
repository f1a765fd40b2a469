"""The order of the folders, and what may be imported nowhere."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# A folder imports from earlier rows only, never from its own row.
ROWS = (
    ("terminal",),
    ("fields", "types", "torus"),
    ("config", "tree", "files"),
    ("ops", "sharding", "tokenizers"),
    ("data", "model"),
    ("checkpoint",),
    ("train", "infer", "interp", "plan"),
    ("report", "serve", "verify", "chat", "evaluation"),
    ("flags",),
    ("commands",),
    # `jaxlm` itself: the public names, which nothing in the package takes from there.
    ("cli", "configs", "jaxlm"),
    ("train.py", "sample.py"),
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
# Packages that would put another framework, or code in a file, beside jax.
FORBIDDEN = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"),
    *("marshal", "torch", "tensorflow", "keras", "haiku", "equinox", "transformers"),
}
# Runs transformers, where it is there, to compare with.
PEER = REPOSITORY / "jaxlm" / "verify" / "peer.py"


def files():
    paths = [*REPOSITORY.glob("jaxlm/**/*.py"), *REPOSITORY.glob("configs/*.py")]
    return sorted([*paths, REPOSITORY / "train.py", REPOSITORY / "sample.py"])


def station(path):
    """The folder or file of the plan that a path belongs to."""
    first, *rest = path.relative_to(REPOSITORY).parts
    if first != "jaxlm":
        return first
    name = rest[0].removesuffix(".py")
    return "jaxlm" if name == "__init__" else name


def imported(source):
    """Full names of the modules and objects that a source imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def stations_of(source):
    """The stations of the plan that a source imports."""
    for name in imported(source):
        first, _, rest = name.partition(".")
        if first in ("train", "sample", "configs"):
            yield {"configs": "configs"}.get(first, f"{first}.py")
        elif first == "jaxlm":
            second = rest.partition(".")[0]
            yield second if second in ROW else "jaxlm"


def violations(own, source):
    return sorted(
        {
            other
            for other in stations_of(source)
            if other != own and ROW[other] >= ROW[own]
        }
    )


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_come_from_the_left(path):
    own = station(path)
    assert own in ROW, f"{own} has no place in the order of the folders"
    assert violations(own, path.read_text()) == []


@pytest.mark.parametrize(
    "own, source, wrong",
    [
        ("ops", "from jaxlm.model.block import Block", ["model"]),
        ("ops", "from jaxlm.sharding import rules", ["sharding"]),
        ("model", "def f():\n    from jaxlm.interp import trace", ["interp"]),
        ("train", "import jaxlm.infer.generate", ["infer"]),
        ("checkpoint", "from jaxlm import train", ["train"]),
        ("checkpoint", "from jaxlm import forward", ["jaxlm"]),
        ("infer", "import train", ["train.py"]),
        ("data", "from jaxlm.data.order import RowOrder", []),
        ("model", "from jaxlm.config import ModelConfig", []),
    ],
)
def test_the_rule_sees_what_it_forbids(own, source, wrong):
    assert violations(own, source) == wrong


def test_the_plan_names_no_folder_that_does_not_exist():
    later = {"interp", "serve"}
    stations = {station(path) for path in files()}
    assert set(ROW) - later <= stations


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_no_pickle_and_no_other_framework(path):
    source = path.read_text()
    roots = {name.partition(".")[0] for name in imported(source)}
    allowed = {"torch", "transformers"} if path == PEER else set()
    assert not roots & FORBIDDEN - allowed
    assert not re.search(r"allow_pickle\s*=\s*True", source)
    assert not re.search(r"trust_remote_code(?!=False)", source)


def names_in(folder):
    for path in (REPOSITORY / "jaxlm" / folder).glob("**/*.py"):
        yield from imported(path.read_text())


def test_train_knows_no_text_and_infer_opens_no_file():
    assert not [name for name in names_in("train") if name.startswith("jaxlm.data")]
    assert not [name for name in names_in("infer") if name.startswith("jaxlm.data")]
    assert not {"pathlib.Path", "io", "os"} & set(names_in("infer"))


def test_formulas_know_neither_flax_nor_configs():
    names = set(names_in("ops"))
    assert "jax" in names
    assert not [name for name in names if name.startswith("flax")]
    assert not [name for name in names if name.startswith("jaxlm.config")]
