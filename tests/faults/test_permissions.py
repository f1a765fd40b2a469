"""Files and folders of another user: refused at the start, or fallen back from."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from checkpoint_case import run_with_steps

from jaxlm.config import DataConfig
from jaxlm.data.disk_cache import read_or_build

# What the child imports is imported before.
CHILD = """
import json, os, sys
from pathlib import Path
from checkpoint_case import restore
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from test_permissions import become_another_user

def attempt(name):
    said = []
    try:
        with CheckpointManager(Path(sys.argv[1]) / name, report=said.append) as manager:
            return restore(manager).step, said
    except ValueError as error:
        return str(error), said

attempt("sound")
become_another_user()
print(json.dumps({name: attempt(name) for name in sys.argv[2:]}))
"""

# Reads entries that root has made, or makes its own; then likewise as old tokens.
CACHE_CHILD = """
import json, sys
from test_permissions import become_another_user, entry

become_another_user()
found = {}
for name in sys.argv[2:]:
    for old_tokens in (False, True):
        try:
            found[f"{name} {old_tokens}"] = entry(sys.argv[1], name, old_tokens)
        except ValueError as error:
            found[f"{name} {old_tokens}"] = str(error)
print(json.dumps(found))
"""


def become_another_user():
    """Drops the rights of root, which may do everything."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def entry(cache, key, old_tokens=False):
    """Reads an entry of a cache; it holds the process that has built it."""
    config = DataConfig(cache_dir=str(cache), old_tokens=old_tokens)

    def build(work):
        (work / "pid").write_text(str(os.getpid()))

    def read(folder):
        return int((folder / "pid").read_text())

    return read_or_build(config, "a text", key, build, read)


def as_another_user(program, *arguments):
    """Runs a program in a child; returns the JSON that it prints."""
    child = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        **{"capture_output": True, "text": True, "timeout": 1000},
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.fixture
def folder():
    """A folder in which every user may do everything."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)
        for path in Path(name).rglob("*"):  # so that it can be removed
            if path.is_dir():
                path.chmod(0o777)


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
    found = as_another_user(CHILD, folder, *names)
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


def test_users_share_a_cache_and_leave_what_they_may_not_read(folder):
    """It was taken for damaged, and each start removed the entry of the other user."""
    names = ("shared", "closed", "file")
    umask = os.umask(0o022)
    try:
        for name in names:
            assert entry(folder, name) == os.getpid()
    finally:
        os.umask(umask)
    # As earlier versions have made them.
    (folder / "closed").chmod(0 if os.getuid() else 0o700)
    (folder / "file" / "pid").chmod(0)
    found = as_another_user(CACHE_CHILD, folder, *names)
    assert found.pop("shared False") == found.pop("shared True") == os.getpid()
    path = {"closed": folder / "closed", "file": folder / "file" / "pid"}
    for name, message in found.items():
        key, old_tokens = name.split()
        assert f"{path[key]} cannot be read (Permission denied) and is left" in message
        assert f"let its owner share the tokens (chmod -R a+rX {folder / key}), " in (
            message
        )
        last = "restore the text, or start a new run"
        if old_tokens == "False":
            last = "or set data.cache_dir to a folder of your own"
        assert message.endswith(last)
        assert message.startswith("data.old_tokens: ") == (old_tokens == "True")
    (folder / "closed").chmod(0o700)
    (folder / "file" / "pid").chmod(0o600)
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    assert [entry(folder, name) for name in names] == [os.getpid()] * 3
