"""Finds what is known: the induction heads of a model that the guide's commands train."""

import re
import shlex
from pathlib import Path

import pytest

from jaxlm.cli import main
from jaxlm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# The same in fewer steps, with shorter rows.
SHORT = "--train.steps 200 --data.sequence-length 32 --train.look-every 50 "
SHORT += "--data.holdout-fraction 0"


def scripts(chapter):
    """The shell scripts of a chapter, and the Python that is in them."""
    text = (ROOT / "docs/inside.md").read_text().split(f"## {chapter}\n")[1]
    blocks = re.findall(r"```bash\n(.*?)```", text.split("\n## ")[0], re.DOTALL)
    python = r'python -c "\n(.*?)"|<<\'END\'\n(.*?)END\n'
    inner = [re.search(python, block, re.DOTALL) for block in blocks]
    return blocks, ["".join(found.groups("")) if found else None for found in inner]


@pytest.mark.slow
def test_induction_heads_appear_and_the_loss_needs_them(tmp_path, monkeypatch, capsys):
    blocks, (make_text, _, ablate) = scripts("An induction head, from nothing")
    monkeypatch.chdir(tmp_path)
    for long, short in (("4000", "1000"), ("(8, 24)", "(4, 12)")):
        assert long in make_text
        make_text = make_text.replace(long, short)
    exec(make_text, {})
    Path("repeats.jsonl").write_text(capsys.readouterr().out)
    train = re.search(r"^python train.py configs/(.*)$", blocks[0], re.MULTILINE)
    config, *flags = shlex.split(train.group(1))
    config = str(ROOT / "configs" / config)
    assert main(["train", config, *flags, *SHORT.split()]) == 0
    looks = [row for row in read_metrics("runs/induction") if row["kind"] == "look"]
    assert looks[0]["induction"] < 0.1 and looks[-1]["induction"] > 0.8
    capsys.readouterr()
    exec(ablate, {})
    first, *rows = capsys.readouterr().out.splitlines()
    loss = float(first.removeprefix("loss "))
    number = r"[-+]?\d+\.\d+"
    heads = [[float(x) for x in re.findall(number, row)] for row in rows]
    previous, copies, without = zip(*heads, strict=True)
    assert len(heads) == 8 and loss < 0.5
    # The second layer copies, and needs the head of the first that tells each token
    # what stood before it.
    assert max(previous[:4]) > 0.9 and max(copies[4:]) > 0.8
    assert max(previous[4:]) < 0.3 and max(copies[:4]) < 0.1
    assert previous[without.index(max(without))] > 0.6
    assert max(without) > loss + 0.5 and max(without[4:]) > loss + 0.1
