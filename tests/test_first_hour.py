"""The first hour of three people, with shorter runs: what no screen may show."""

import re

import first_hour_case
import pytest

SIZE = (
    "--model.num-layers 1 --model.model-dim 32 --model.num-heads 2 "
    "--model.num-kv-heads 1 --model.head-dim 16 --model.hidden-dim 64 "
    "--data.holdout-fraction 0.01"
)
FEW = "--train.steps 300 --train.eval-every 100 --train.sample-every 100"
# A traceback, a box that tyro draws, escape signs in the open, a line that was cut.
NOISE = re.compile(r"Traceback|[│╭╰]|\^\[|\\x1b|…$")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each person saw, by the command."""
    folder = tmp_path_factory.mktemp("first_hour") / "work"
    model = first_hour_case.prepare(folder)
    steps = [
        *first_hour_case.student(SIZE, FEW),
        *first_hour_case.engineer(model),
        *first_hour_case.researcher(),
    ]
    return [first_hour_case.play(step, folder) for step in steps]


@pytest.mark.slow
def test_each_command_ends_as_it_should(seen):
    assert not [str(s) for s in seen if s.code != s.step.code]


@pytest.mark.slow
def test_no_screen_shows_noise(seen):
    found = [
        f"{s.step.command}: {line}"
        for s in seen
        for line in s.lines
        if NOISE.search(line)
    ]
    assert not found


def whole_lines(lines: list[str]) -> list[str]:
    """A line that fills the terminal, but for a space, goes on in the next one."""
    whole, goes_on = [], False
    for line in lines:
        whole = [*whole[:-1], whole[-1] + line] if goes_on else [*whole, line]
        goes_on = len(line) >= first_hour_case.COLUMNS - 1
    return whole


@pytest.mark.slow
def test_an_error_is_one_line(seen):
    for s in (s for s in seen if s.code == 2 and s.step.command != "jaxlm"):
        *before, error = whole_lines(s.lines)
        assert error.startswith("error: "), str(s)
        assert all(line.startswith("sampling from ") for line in before), str(s)
