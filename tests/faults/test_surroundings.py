"""What surrounds a run may be missing, full or closed: it costs a line, not the run."""

import os
import pwd
import subprocess
import sys

import jax
import pytest
from run_case import CONFIG, REPOSITORY, Run

from jaxlm.commands import process
from jaxlm.data.disk_cache import build_once
from jaxlm.ops.attention.tuning import tuning_cache
from jaxlm.train.metrics import read_metrics

BASE = CONFIG.replace("sample_tokens=8", "sample_tokens=0").replace(
    "steps=12", "steps=3"
)
TRAIN, SAMPLE = (f"{sys.executable} {REPOSITORY}/{n}.py" for n in ("train", "sample"))


@pytest.fixture
def no_home(monkeypatch):
    def getpwuid(_user):
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    return "the user has no home folder"


@pytest.fixture
def file_for_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    return "Not a directory"


@pytest.mark.parametrize("fault", ["no_home", "file_for_cache"])
def test_without_a_cache_folder_it_goes_on(fault, request, caplog, monkeypatch):
    """As a user of `docker run --user` who is in no list of users."""
    reason = request.getfixturevalue(fault)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda *c: changed.append(c))
    process.use_compile_cache()
    folder = build_once(None, "key", lambda work: (work / "x").write_text("text"))
    assert (folder / "x").read_text() == "text" and changed == []
    assert build_once(None, "key", pytest.fail) == folder
    compiled, tokens = caplog.messages
    assert compiled.startswith("compiled programs are not kept: ")
    assert tokens.startswith("tokens are not kept: ")
    assert reason in compiled and reason in tokens
    assert tuning_cache.measured("key", "default") == "default"
    # A folder that the user names is left to JAX.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    process.use_compile_cache()
    assert process.compile_cache_folder() == "gs://bucket/compiled"
    assert changed == [] and len(caplog.messages) == 2


def shell(command, folder, **environment):
    """Runs a line of bash; returns its exit code and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        **{"env": environment, "cwd": folder, "timeout": 1000},
        **{"capture_output": True, "text": True},
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_training_does_not_depend_on_who_listens(tmp_path):
    for number, outputs in enumerate(("2>&1 | head -1", "2>/dev/full >&- <&-")):
        run = Run(tmp_path, f"run{number}", BASE)
        code, err = shell(f"{TRAIN} {run.config} {outputs}", tmp_path)
        assert code == 0 and err == "", err
        assert run.steps() == [3]
        assert [r["step"] for r in read_metrics(run.path) if r["kind"] == "train"]


@pytest.mark.slow
def test_a_cache_that_is_a_file_and_files_that_are_folders(tmp_path):
    run = Run(tmp_path, "run", BASE)
    for name in ("config.json", "loss.png", "report.html", "metrics.jsonl"):
        (run.path / name / "inside").mkdir(parents=True)
    file = tmp_path / "file"
    file.write_text("")
    places = {"XDG_CACHE_HOME": str(file), "HOME": str(file)}
    places["JAX_COMPILATION_CACHE_DIR"] = ""
    code, err = shell(f"{TRAIN} {run.config}", tmp_path, **places)
    assert code == 0 and "Traceback" not in err, err
    lines = err.splitlines()
    for words in (
        f"compiled programs are not kept: {file}/jaxlm",
        f"tokens are not kept: {file}/jaxlm",
        f"{run.path}/config.json: cannot write",
        "the report cannot be written: ",
    ):
        assert sum(words in line for line in lines) == 1, err
    # With the model that it left, a sample that nobody can read.
    command = f"{SAMPLE} {run.path} --max-new-tokens 2 --prompt a > /dev/full"
    code, err = shell(command, tmp_path, **places)
    assert code == 2, err
    assert (
        "Traceback" not in err
        and err.splitlines()[-1]
        == "error: the output cannot be written (No space left on device)"
    )


@pytest.mark.slow
def test_what_is_written_at_the_end_does_not_hide_how_it_ended(tmp_path):
    """The disk is full from the second step on."""
    run = Run(tmp_path, "run", BASE)
    code, _, err = run.train(fault="fill@2")
    assert code == 2 and "Traceback" not in err, err
    failed = f"{run.path}/checkpoints/3 cannot be written (File too large)"
    again, line = [line for line in err.splitlines() if failed in line]
    assert again.endswith("; trying again") and line.startswith("error: ")
    assert err.splitlines()[-1] == line


@pytest.mark.slow
def test_a_run_folder_that_is_deleted_loses_no_training(tmp_path):
    """It is made again for the next checkpoint, from which the run can go on."""
    run = Run(tmp_path, "run", BASE)
    code, _, err = run.train(fault="delete@2")
    assert code == 0 and "Traceback" not in err, err
    assert f"{run.path} was deleted or replaced during the run: it is made" in err
    assert run.steps() == [3]
    assert {"config.json", "texts.json"} <= {p.name for p in run.path.iterdir()}
    assert "all 3 steps are done" in run.train()[1]


PROGRAMS = """
import sys
import jax, jax.numpy as jnp
from jaxlm.commands.process import log_on_stderr, use_compile_cache
with log_on_stderr(False):
    use_compile_cache()
x = jnp.ones((8, 8))
print([float(jax.jit(lambda x: jnp.sin(x @ x * k).sum())(x)) for k in range(1, 5)])
"""


@pytest.mark.slow
def test_a_damaged_program_is_compiled_again(tmp_path):
    """One flipped bit of a program is machine code too."""
    cache = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    command = f"{sys.executable} -c '{PROGRAMS}'"
    code, first = shell(f"{command} >&2", tmp_path, **cache)
    assert code == 0 and "damaged" not in first, first
    files = sorted((tmp_path / "jaxlm" / "xla").glob("*-cache"))
    assert len(files) >= 4
    for number, file in enumerate(files):
        content = bytearray(file.read_bytes())
        content[(number + 1) * len(content) // (len(files) + 1)] ^= 4
        file.write_bytes(content)
    code, err = shell(f"{command} >&2", tmp_path, **cache)
    line, *rest = err.splitlines()
    assert code == 0 and "\n".join(rest) == first.strip(), err
    assert f"{len(files)} compiled programs were damaged, and are made again" in line
    assert shell(f"{command} >&2", tmp_path, **cache) == (0, first)
