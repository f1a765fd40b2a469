"""Command lines: the flags of dataclasses, and what is said of wrong ones."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from jaxlm.config import MeshConfig, SampleConfig
from jaxlm.flags.flag_table import Flat, Positional, flags_of, in_flags
from jaxlm.flags.help_text import help_text
from jaxlm.flags.parse import parse


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Does something.

    Example: {prog} FILE --size 3
    """

    source: Positional[Path]
    """What to read, 100% of it."""
    more: Positional[tuple[str, ...]] = ()
    """What else to read."""
    size: int | None = 2
    """Its size."""
    ratios: tuple[float, ...] = (0.5,)
    kind: Literal["small", "large"] | None = None
    """Its kind."""
    on: bool = True
    """Whether it is on."""
    end: str = "\n"
    """Its end."""
    sample: Flat[SampleConfig] = field(
        default_factory=lambda: SampleConfig(temperature=0.8)
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)


def read(*arguments):
    return parse(Arguments, arguments, prog="program")


def test_values_have_the_types_of_their_fields():
    assert read("x") == Arguments(source=Path("x"))
    everything = read(
        *("--size", "None", "--ratios", "1", "2.5", "--kind", "small", "--no-on"),
        *("--top_k", "3", "--mesh.fsdp=-1", "--mesh.data", "1", "--end=-v", "x", "y"),
    )
    assert read("x", "--end=--").end == "--"
    assert everything == Arguments(
        source=Path("x"),
        more=("y",),
        size=None,
        ratios=(1.0, 2.5),
        kind="small",
        on=False,
        end="-v",
        sample=SampleConfig(temperature=0.8, top_k=3),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    # Arguments without flags may stand anywhere, and the last value counts.
    assert read("--size", "-4", "x", "--on", "--size", "5", "y").more == ("y",)


WRONG = {
    "--sizes 3": r"unknown flag '--sizes' \(did you mean '--size'\?\); --help lists",
    "--top_kk=3": r"unknown flag '--top_kk=3' \(did you mean '--top-k'\?\)",
    "--temp 3": r"unknown flag '--temp' \(did you mean '--temperature'\?\)",
    "--fsdp 3": r"unknown flag '--fsdp' \(did you mean '--mesh\.fsdp'\?\)",
    "--qwertyuiop": r"unknown flag '--qwertyuiop'; --help lists",
    "-x": r"unknown flag '-x'; --help lists",
    "--device cpu": r"unknown flag '--device' \(JAX_PLATFORMS=cpu in the environment",
    "--size": r"--size needs a value",
    "--size --on": r"--size needs a value",
    f"--size {'4' * 5000}": r"--size is '4{46,49}\.{3}4{46,49}': it must be an integer$",
    "--size many": r"--size is 'many': it must be an integer$",
    "--size 2.5": r"--size is '2\.5': it must be an integer$",
    "--ratios 1 x": r"--ratios is 'x': it must be a number",
    "--kind smal": r"--kind is 'smal': it must be one of .*mean 'small'\?\)$",
    "--on=False": r"--on takes no value: --no-on is its opposite",
    "--no-on true": r"--on takes no value: --no-on is its opposite",
    "--mesh.data 0": r"mesh\.data is 0: it must be >= 1, or -1",
    "": r"SOURCE is missing; --help lists",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_flag_is_named_with_its_remedy(line):
    arguments = [*line.split(), *["x"] * ("--" in line)]
    if line == "--size":
        arguments.reverse()
    with pytest.raises(ValueError, match=f"^{WRONG[line]}"):
        read(*arguments)


def test_messages_name_flags_instead_of_fields():
    message = "sample.top_k is 3, not mesh.data 4 (see docs/mesh.data, x.mesh.data)."
    assert in_flags(message, Arguments) == (
        "--top-k is 3, not --mesh.data 4 (see docs/mesh.data, x.mesh.data)."
    )
    # What the command line already names stays, and so does what has no flag.
    for same in ("--mesh.data is 0", "model.num_heads is 3", "mesh.database"):
        assert in_flags(same, Arguments) == same


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_help_tells_every_flag_within_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text(Arguments, "program", first=["kind"])
    assert text.startswith("usage: program SOURCE [MORE ...] [--flag VALUE ...]\n")
    assert max(map(len, text.splitlines())) <= min(columns, 88)
    assert "\nExample: program FILE --size 3\n" in text
    words = " ".join(text.split())
    for flag in flags_of(Arguments):
        assert f" {flag.name} " in words.replace(",", " "), flag
    assert "What to read, 100% of it." in words
    assert "Its kind. (one of small, large; default: None)" in words
    assert "--on, --no-on Whether it is on. (default: True)" in words
    assert "0 takes the most likely token. (default: 0.8)" in words
    assert r"Its end. (default: '\n')" in words
    order = [
        "arguments:",
        "matter most:",
        "--kind NAME",
        "flags:",
        "--size INT",
        "mesh:",
    ]
    assert sorted(order, key=words.index) == order


def test_help_ends_the_program(capsys):
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as end:
            read(flag)
        assert not end.value.code
        assert capsys.readouterr().out == help_text(Arguments, "program")
