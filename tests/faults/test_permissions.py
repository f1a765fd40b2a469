"""Files and folders of another user: refused at the start, or fallen back from."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from checkpoint_case import run_with_steps

# Drops the rights of root, which may do everything. What is imported is imported before.
CHILD = """
import json, os, sys
from pathlib import Path
from checkpoint_case import restore
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager

def attempt(name):
    said = []
    try:
        with CheckpointManager(Path(sys.argv[1]) / name, report=said.append) as manager:
            return restore(manager).step, said
    except ValueError as error:
        return str(error), said

attempt("sound")
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
print(json.dumps({name: attempt(name) for name in sys.argv[2:]}))
"""


@pytest.fixture
def folder():
    """A folder in which every user may do everything."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def open_to_all(folder, *names):
    """Makes runs with steps 1 and 2, in which another user may do everything."""
    for name in names:
        run = run_with_steps(folder / name, 1, 2)
        for path in (run, *run.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)


def test_as_another_user(folder):
    names = ("closed", "checkpoints", "lock", "file", "step")
    open_to_all(folder, "sound", *names)
    (folder / "closed").chmod(0o555)
    (folder / "checkpoints" / "checkpoints").chmod(0o555)
    (folder / "lock" / ".lock").chmod(0o444)
    (folder / "file" / "checkpoints" / "2" / "meta.json").chmod(0)
    (folder / "step" / "checkpoints" / "2").chmod(0)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        **{"capture_output": True, "text": True, "timeout": 1000},
    )
    for path in folder.rglob("*"):  # so that it can be removed
        if path.is_dir():
            path.chmod(0o777)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    for name in ("closed", "checkpoints"):
        message, _ = found[name]
        assert "cannot be written to (Permission denied: " in message, message
        assert "choose another with --train.run-dir, or fix its permissions" in message
    assert (
        f"{folder}/lock/.lock cannot be opened (Permission denied)" in found["lock"][0]
    )
    for name in ("file", "step"):
        step, (line,) = found[name]
        assert step == 1 and line.startswith("step 2 unreadable (Permission denied: ")
        assert line.endswith("using step 1")
