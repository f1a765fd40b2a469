"""The package without a checkout: a wheel trains with its default config and samples."""

import os
import shutil
import subprocess
import sys

import pytest

TINY = [
    "--train.steps",
    "2",
    "--train.batch-size",
    "2",
    "--train.eval-every",
    "0",
    "--train.sample-every",
    "0",
    "--optimizer.warmup-steps",
    "1",
    "--data.sequence-length",
    "32",
    "--data.holdout-fraction",
    "0.01",
    "--model.num-layers",
    "1",
    "--model.model-dim",
    "32",
    "--model.hidden-dim",
    "64",
    "--model.context-length",
    "64",
    "--train.run-dir",
    "runs/tiny",
]


def python(*arguments, folder, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_trains_and_samples(repository, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs", "jaxlm"):
        copy = shutil.copytree if (repository / name).is_dir() else shutil.copy
        options = {"symlinks": True} if copy is shutil.copytree else {}
        copy(repository / name, source / name, **options)
    pip = ("-m", "pip", "--disable-pip-version-check")
    built = ("--no-deps", "--no-build-isolation", "--wheel-dir", ".")
    python(*pip, "wheel", *built, source, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    installed = ("--no-deps", "--no-index", "--target", "site")
    python(*pip, "install", *installed, wheel, folder=tmp_path)
    shutil.rmtree(source)

    home = tmp_path / "home"
    home.mkdir()

    def jaxlm(*words):
        cli = ("-m", "jaxlm.cli")
        return python(*cli, *words, folder=home, PYTHONPATH=str(tmp_path / "site"))

    where = ("-c", "import jaxlm; print(jaxlm.__file__)")
    file = python(*where, folder=home, PYTHONPATH=str(tmp_path / "site"))
    assert file.startswith(str(tmp_path / "site"))
    out = jaxlm("train", *TINY).splitlines()
    assert out == ["runs/tiny/report.html", "jaxlm sample runs/tiny"]
    left = {path.name for path in (home / "runs" / "tiny").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "loss.png"} <= left
    text = jaxlm("sample", "--prompt", "ROMEO:", "--max-new-tokens", "4")
    assert text.startswith("ROMEO:") and len(text) > len("ROMEO:\n")
