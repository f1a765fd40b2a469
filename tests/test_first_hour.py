"""The first hour of three people, with shorter runs: what no screen may show."""

import dataclasses
import re

import first_hour_case
import jax
import pytest

from jaxlm.checkpoint.gguf.gguf_model import write_model
from jaxlm.checkpoint.load import load, open_checkpoint

SIZE = (
    "--model.num-layers 1 --model.model-dim 32 --model.num-heads 2 "
    "--model.num-kv-heads 1 --model.head-dim 16 --model.hidden-dim 64 "
    "--data.holdout-fraction 0.01 --data.sequence-length 64 --train.batch-size 4"
)
FEW = "--train.steps 80 --train.eval-every 40 --train.sample-every 40"
NOTES = "--train.sample-every 0"
# A traceback, a box that tyro draws, escape signs in the open, a line that was cut.
NOISE = re.compile(r"Traceback|[│╭╰]|\^\[|\\x1b|…$")


def whole_lines(lines: list[str]) -> list[str]:
    """A line that fills the terminal, but for a space, goes on in the next one."""
    whole, goes_on = [], False
    for line in lines:
        whole = [*whole[:-1], whole[-1] + line] if goes_on else [*whole, line]
        goes_on = len(line) >= first_hour_case.COLUMNS - 1
    return whole


def check(step, folder):
    seen = first_hour_case.play(step, folder)
    assert seen.code == step.code, str(seen)
    assert not [line for line in seen.lines if NOISE.search(line)], str(seen)
    if seen.code == 2 and step.command != "jaxlm":
        *before, error = whole_lines(seen.lines)
        assert error.startswith("error: "), str(seen)
        assert all(line.startswith("sampling from ") for line in before), str(seen)


def first_layer(model, path):
    """Writes a published model with its tokenizer, and with one of its layers."""
    opened = open_checkpoint(model)
    config, params = load(opened)
    params["layers"] = jax.tree.map(lambda x: x[:1], params["layers"])
    config = dataclasses.replace(config, num_layers=1)
    write_model(path, config, params, opened.tokenizer(), "q8_0")
    return path


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("person", ["student", "engineer", "researcher"])
def test_each_command_ends_as_it_should_and_shows_no_noise(person, tmp_path):
    """And an error is one line."""
    model = first_hour_case.prepare(tmp_path / "work")
    steps = {
        "student": lambda: first_hour_case.student(SIZE, FEW, NOTES),
        "engineer": lambda: first_hour_case.engineer(
            model, first_layer(model, tmp_path / "small.gguf")
        ),
        "researcher": first_hour_case.researcher,
    }
    for step in steps[person]():
        check(step, tmp_path / "work")
