"""The package without a checkout: a wheel, in an empty environment, does everything."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv

import pytest
from hugging_face_case import golden_tokenizer
from packaging.requirements import Requirement
from toy_case import make_params, toy

from jaxlm.checkpoint.save import save

TINY = """--train.steps 2 --train.batch-size 2 --train.eval-every 0 --train.sample-every 0
    --data.sequence-length 32 --data.holdout-fraction 0.01 --model.num-layers 1
    --model.model-dim 32 --model.hidden-dim 64 --model.context-length 64
    --train.run-dir runs/tiny"""


def run(*command, folder, **options):
    """Standard output of a command that ends with code 0.

    Without our own paths, and compiled as users compile, which no other test does.
    """
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=own,
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(repository, folder):
    """Builds a wheel from a copy of the sources, and removes the copy."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs", "jaxlm"):
        copy = shutil.copytree if (repository / name).is_dir() else shutil.copy
        options = {"symlinks": True} if copy is shutil.copytree else {}
        copy(repository / name, source / name, **options)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = ("--no-deps", "--no-build-isolation", "--wheel-dir", ".")
    run(*pip, "wheel", *built, source, folder=folder)
    shutil.rmtree(source)
    return next(folder.glob("*.whl"))


def add_dependencies(distribution, site, extras=frozenset()):
    """Links what a distribution declares, and all that it needs, from this environment.

    That is what `pip install` would bring, without a network: a package that is not
    declared is missing there.
    """
    for line in distribution.requires or ():
        wanted = Requirement(line)
        extra = [{"extra": name} for name in ("", *extras)]
        if wanted.marker and not any(map(wanted.marker.evaluate, extra)):
            continue
        found = importlib.metadata.distribution(wanted.name)
        assert wanted.specifier.contains(found.version), line
        tops = {file.parts[0] for file in found.files} - {"..", "__pycache__"}
        new = [top for top in tops if not (site / top).is_symlink()]
        for top in new:
            (site / top).symlink_to(found.locate_file(top))
        if new or wanted.extras:
            add_dependencies(found, site, wanted.extras)


@pytest.mark.slow
@pytest.mark.long
def test_a_wheel_trains_samples_and_chats(repository, tmp_path):
    environment, home = tmp_path / "environment", tmp_path / "home"
    home.mkdir()
    wheel = build_wheel(repository, tmp_path)
    venv.create(environment)
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    (metadata,) = environment.glob("lib/*/site-packages/jaxlm-*.dist-info")
    jaxlm = importlib.metadata.Distribution.at(metadata)
    add_dependencies(jaxlm, metadata.parent)

    command = environment / "bin" / "jaxlm"
    assert run(command, "--version", folder=home) == f"jaxlm {jaxlm.version}\n"
    out = run(command, "train", *TINY.split(), folder=home).splitlines()
    assert out[-1] == "jaxlm sample runs/tiny"
    left = {path.name for path in (home / "runs" / "tiny").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "loss.png"} <= left
    flags = ("--prompt", "ROMEO:", "--max-new-tokens", "4")
    text = run(command, "sample", *flags, folder=home)
    assert text.startswith("ROMEO:") and len(text) > len("ROMEO:\n")

    # A run whose tokenizer has a chat template.
    tokenizer = golden_tokenizer("byte_level", tmp_path)
    model = toy(vocab_size=tokenizer.vocab_size, context_length=128)
    save(home / "runs" / "chat", model, make_params(model), tokenizer)
    words = ("chat", "runs/chat", "--max-new-tokens", "4")
    assert run(command, *words, folder=home, input="Hello\n").endswith("\n")
