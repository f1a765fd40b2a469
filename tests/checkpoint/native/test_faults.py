"""Killed processes, full disks, and two processes in one run folder."""

import errno
import fcntl
import os
import random
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from checkpoint_case import (
    restore,
    run_child,
    run_with_steps,
    save,
    start_child,
    state_of_step,
)

from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native import arrays, checkpoint_manager, integrity
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.run_folder import find_runs, list_steps, move_aside
from jaxlm.checkpoint.native.save_error import SaveError, save_failed
from jaxlm.files import durable
from jaxlm.sharding.processes import ProcessFailed

DIE = """
import os, sys
from checkpoint_case import restore, save
from jaxlm.files import durable
from jaxlm.checkpoint.native import integrity, run_folder
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
checkpoints = CheckpointManager(sys.argv[1], keep=1)
restore(checkpoints)

def die(*arguments):
    os._exit(9)

def die_half_way(path):
    victim = sorted(p for p in path.rglob("*") if p.is_file())[0]
    victim.unlink()
    os._exit(9)

where = sys.argv[2]
if where == "write":
    integrity.write_manifest = die
elif where == "commit":
    durable.rename = die
elif where == "delete":
    run_folder.remove = die_half_way
save(checkpoints, int(sys.argv[3]))
"""


@pytest.mark.parametrize(
    "where, steps", [("write", [1]), ("commit", [1]), ("delete", [2])]
)
def test_death_while_saving_or_deleting_leaves_only_whole_steps(tmp_path, where, steps):
    run = run_with_steps(tmp_path, 1)
    code, _, err = run_child(DIE, run, where, 2)
    assert code == 9, err
    reported = []
    assert len(list((run / "checkpoints").glob(".tmp-*"))) == 1
    with CheckpointManager(run, report=reported.append) as checkpoints:
        assert checkpoints.steps() == steps
        assert restore(checkpoints).step == steps[-1]
    assert len(reported) == 1 and reported[0].startswith("removed .tmp-")
    assert not list((run / "checkpoints").glob(".tmp-*"))


SAVE_FOR_EVER = """
import sys
from checkpoint_case import restore, save
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
checkpoints = CheckpointManager(sys.argv[1], keep=3)
restored = restore(checkpoints)
step = restored.step if restored else 0
print("start", step, flush=True)
while True:
    step += 1
    save(checkpoints, step, wait=False)
"""


@pytest.mark.slow
def test_sigkill_at_any_time_leaves_only_readable_steps(tmp_path):
    generator = random.Random(1)
    newest = 0
    for turn in range(4):
        child = start_child(SAVE_FOR_EVER, tmp_path)
        child.wait_for(f"start {newest}\n")
        # The first may have saved nothing yet.
        while turn and list_steps(tmp_path)[-1:] in ([], [newest]):
            time.sleep(0.01)
        time.sleep(generator.uniform(0.1, 0.6))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        steps = list_steps(tmp_path)
        for step in steps:
            _, params = load(tmp_path / f"checkpoints/{step}")
            assert float(params["embed"]["table"][0, 0]) == step
        newest = steps[-1] if steps else 0
    assert newest > 0
    with CheckpointManager(tmp_path, report=lambda line: None) as checkpoints:
        restored = restore(checkpoints)
        assert restored.step == newest
        assert float(restored.opt_state[1][0].mu["embed"]["table"][0, 0]) == newest


FULL = """
import resource, signal, sys
import jax.numpy as jnp
from checkpoint_case import abstract, restore, save, state_of_step
from jaxlm.checkpoint.native import checkpoint_manager
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.save_error import SaveError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import jax
small = state_of_step(1)
keys = jax.random.split(jax.random.key(0), 9)
# Each of them fails, and only one may be heard of.
big = ({str(i): jax.random.normal(key, (100, 100)) for i, key in enumerate(keys)}, ())
checkpoints = CheckpointManager(sys.argv[1], keep=2)
save(checkpoints, 1, small)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
save(checkpoints, 2, big, wait=False)
try:
    checkpoints.wait()
except SaveError as e:
    print(e)
save(checkpoints, 3, big, wait=False)
try:
    save(checkpoints, 4, big, wait=False)
except SaveError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, resource.RLIM_INFINITY))
print(checkpoints.steps(), restore(checkpoints).step)
save(checkpoints, 5, small)
print(checkpoints.steps())
checkpoints.close()
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error_with_path_and_bytes(tmp_path):
    code, out, err = run_child(FULL, tmp_path)
    assert code == 0, err
    first, second, steps, later = out.splitlines()
    for line, step in ((first, 2), (second, 3)):
        assert f"{tmp_path}/checkpoints/{step} cannot be written (" in line
        assert "File too large" in line and "its arrays have 360,000" in line
    assert (steps, later) == ("[1] 1", "[1, 5]")
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    # Once for each save, although each has many arrays that fail.
    assert len(lines := err.splitlines()) == 2, err
    assert all(
        line.endswith("; earlier steps are intact; trying again") for line in lines
    )


@pytest.mark.parametrize(
    "error, words",
    [
        # The arrays fit, but not with their metadata and in whole blocks.
        (
            OSError(errno.ENOSPC, "x"),
            "run/3 cannot be written (No space left on device): a step needs more than "
            "the 258,048 bytes that are free; its arrays have 215,708 bytes. Make "
            "room, or raise your quota; earlier steps are intact",
        ),
        (
            OSError(errno.ENOSPC, "inodes"),
            "run/3 cannot be written (No space left on device): the disk has no room "
            "for more files (df -i); its arrays have 215,708 bytes. Make room, or "
            "raise your quota; earlier steps are intact",
        ),
        (
            ValueError("a paragraph [source locations='x'] [os_error_code='122']"),
            "run/3 cannot be written (Disk quota exceeded); its arrays have 215,708 "
            "bytes. Make room, or raise your quota; earlier steps are intact",
        ),
        (
            ProcessFailed(1, 2, "a paragraph [os_error_code='122']"),
            "run/3 cannot be written (process 1: Disk quota exceeded); its arrays have "
            "215,708 bytes. Make room, or raise your quota; earlier steps are intact",
        ),
        (
            PermissionError(errno.EACCES, "x"),
            "run/3 cannot be written (Permission denied); earlier steps are intact",
        ),
    ],
)
def test_what_a_save_that_failed_says_is_true(monkeypatch, error, words):
    free = 1 << 40 if "inodes" in str(error) else 258_048
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=free))
    assert save_failed(Path("run/3"), 215_708, error) == words


HOLD = """
import sys, time
from pathlib import Path
from jaxlm.checkpoint.native.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(3600)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    child = start_child(HOLD, tmp_path)
    child.wait_for("locked\n")
    try:
        expected = rf"pid {child.pid} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=expected):
            CheckpointManager(tmp_path)
    finally:
        child.kill()
        child.wait()
    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1)


def test_two_runs_whose_steps_are_in_one_place_are_not_trained_at_once(tmp_path):
    """Each would rotate the other's steps away."""
    (tmp_path / "disk").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "disk")
    child = start_child(HOLD, tmp_path / "a")
    child.wait_for("locked\n")
    try:
        match = f"pid {child.pid} .* is training in {tmp_path}/b/checkpoints: "
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                CheckpointManager(tmp_path / "b")
    finally:
        child.kill()
        child.wait()
    with CheckpointManager(tmp_path / "b") as checkpoints:
        save(checkpoints, 1)


def test_a_lock_that_another_run_deletes_while_it_is_taken_is_taken_again(
    tmp_path, monkeypatch
):
    """A run that wrote nothing removes its folder; a third would lock a new file."""
    run, lockf, calls = tmp_path / "run", fcntl.lockf, []

    def lock(descriptor, operation):
        if not calls:
            shutil.rmtree(run)
        calls.append(descriptor)
        lockf(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", lock)
    with CheckpointManager(run) as checkpoints:
        assert len(calls) == 2
        save(checkpoints, 1)
        assert (run / ".lock").read_text() and checkpoints.steps() == [1]


def test_errors_of_the_tokenizer_surface_and_leave_nothing(tmp_path, monkeypatch):
    def broken(self, folder):
        raise RuntimeError("no tokenizer today")

    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)

    class SeenLate(threading.Event):
        """When the save that follows has failed already."""

        def wait(self, timeout=None):
            checkpoints._thread.join()
            return super().wait(timeout)

    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1)
        checkpoints._copied = SeenLate()
        monkeypatch.setattr("checkpoint_case.FakeTokenizer.save", broken)
        save(checkpoints, 2, wait=False)
        with pytest.raises(SaveError, match=r"checkpoints/2 .*no tokenizer today"):
            checkpoints.wait()
        monkeypatch.undo()
        checkpoints.wait()
        save(checkpoints, 3)
        assert checkpoints.steps() == [1, 3]


def test_a_save_that_fails_once_is_tried_again_with_the_same_arrays(
    tmp_path, monkeypatch
):
    """Although the run has overwritten them by then."""
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.3)
    real, said, calls = integrity.write_manifest, [], []

    def fails_once(folder, entries):
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(errno.EIO, "x")
        real(folder, entries)

    monkeypatch.setattr(integrity, "write_manifest", fails_once)
    state = jax.tree.map(jnp.asarray, state_of_step(1))
    wanted = integrity.state_hash(state)
    with CheckpointManager(tmp_path, report=said.append) as checkpoints:
        save(checkpoints, 1, state, wait=False)
        state = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(
            state
        )
        checkpoints.wait()
        restored = restore(checkpoints)
        assert integrity.state_hash((restored.params, restored.opt_state)) == wanted
        assert integrity.state_hash(state) != wanted
    assert said == [
        f"{tmp_path}/checkpoints/1 cannot be written (Input/output error); earlier "
        "steps are intact; trying again"
    ]


@pytest.mark.parametrize("where", ["copy", "thread"])
def test_a_save_that_cannot_begin_is_a_save_error(tmp_path, monkeypatch, where):
    """With --train.on-save-error continue the run goes on."""

    def fail(*_):
        kind = MemoryError if where == "copy" else RuntimeError
        raise kind("there is no more of it")

    with CheckpointManager(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with monkeypatch.context() as patch:
            whole = arrays if where == "copy" else threading.Thread
            patch.setattr(whole, "on_host" if where == "copy" else "start", fail)
            with pytest.raises(
                SaveError, match=r"/2 cannot be .*no more of it.*intact"
            ):
                save(checkpoints, 2)
        save(checkpoints, 3)
        assert checkpoints.steps() == [1, 3]


def test_a_save_that_failed_is_told_when_nobody_waits_for_it(tmp_path, monkeypatch):
    """In a loop of one's own that does not close its manager."""
    said = []
    checkpoints = CheckpointManager(tmp_path, report=said.append)
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(integrity, "write_manifest", mock.Mock(side_effect=OSError))
    save(checkpoints, 1, wait=False)
    checkpoints._thread.join()
    assert len(said) == 1 and said[0].endswith("; trying again")
    checkpoints._at_exit()
    assert said[1].startswith(f"{tmp_path}/checkpoints/1 cannot be written (")
    assert said[1].endswith("(close the CheckpointManager before the program ends)")
    checkpoints._lock.release()


def test_what_a_save_that_failed_leaves_is_not_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    real, errors = integrity.write_manifest, [OSError(errno.EMFILE, "x")]

    def fails_once(folder, entries):
        if errors:
            raise errors.pop()
        real(folder, entries)

    monkeypatch.setattr(integrity, "write_manifest", fails_once)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    with CheckpointManager(tmp_path, report=lambda line: None) as checkpoints:
        save(checkpoints, 1)
        assert not errors and restore(checkpoints).step == 1


def test_a_disk_that_cannot_wait_for_folders_is_refused_only_for_runs(
    tmp_path, monkeypatch
):
    """As older CIFS, vboxsf and 9p; TensorStore could save no step there."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with durable.replacing(tmp_path / "page.html") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"cannot be written to \(Invalid argument"):
        CheckpointManager(tmp_path / "run")


def test_steps_on_another_disk_are_set_aside_there(tmp_path):
    """In a folder whose name is a pattern for Orbax, which would merge nothing."""
    run, disk = tmp_path / "lr[1e-3]*?", Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        run.mkdir()
        (run / "checkpoints").symlink_to(disk)
        run_with_steps(run, 1, 2)
        with CheckpointManager(run, report=lambda line: None) as checkpoints:
            assert restore(checkpoints, step=1).step == 1
            save(checkpoints, 2)
            assert checkpoints.steps() == [1, 2]
        load(run / "old-1")
        with CheckpointManager(run, fresh=True, report=lambda line: None):
            assert list_steps(run / "old-2") == [1, 2] and not list_steps(run)
        assert {path.name for path in disk.iterdir()} == {".lock", "old-1", "old-2"}
    finally:
        shutil.rmtree(disk)


def test_later_steps_are_set_aside_with_the_log_and_not_without(tmp_path, monkeypatch):
    """Its rows of them are dropped when the run goes on."""
    run = run_with_steps(tmp_path, 1, 2)
    (run / "metrics.jsonl").write_text("rows\n")
    with CheckpointManager(run, report=lambda line: None) as checkpoints:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copy", full)
            with pytest.raises(OSError, match="No space"):
                checkpoints.move_aside_after(1)
        assert checkpoints.steps() == [1, 2] and not (run / "old-1").exists()

        def renaming(path, target, rename=Path.rename):
            """As an overlay file system does with what is in a container's image."""
            if path == run / "checkpoints/2":
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", renaming)
        checkpoints.move_aside_after(1)
        assert checkpoints.steps() == [1]
    assert (run / "old-1/metrics.jsonl").read_text() == "rows\n"
    load(run / "old-1")
    assert [path.name for path in (run / "old-1/checkpoints").iterdir()] == ["2"]


def test_runs_may_be_named_as_the_folder_of_steps_or_as_a_step(tmp_path):
    run_with_steps(tmp_path / "checkpoints", 1)
    assert load(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints")
    for name in ("12", "13", "12"):
        run = run_with_steps(tmp_path / "checkpoints" / name, 1)
        assert load(run) and load(run / "checkpoints")


def test_a_copy_of_a_run_that_is_laid_over_it_can_be_read(tmp_path):
    """Data of arrays have random names, so those of both are there then."""
    run, copy = (run_with_steps(tmp_path / name, 1) for name in ("run", "copy"))
    count = len(list(run.rglob("*")))
    shutil.copytree(copy, run, dirs_exist_ok=True)
    assert len(list(run.rglob("*"))) > count
    with CheckpointManager(run, report=lambda line: None) as checkpoints:
        assert restore(checkpoints).step == 1


def test_an_old_step_that_cannot_be_deleted_stops_no_run(tmp_path, monkeypatch):
    """On NFS a folder stays whose files another process has open."""
    run, said = run_with_steps(tmp_path, 1), []

    def remove(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove)
        with CheckpointManager(run, keep=1, report=said.append) as checkpoints:
            restore(checkpoints)
            save(checkpoints, 2)
        assert "the old step 1 in" in said[0] and "the run goes on" in said[0]
        with CheckpointManager(run, report=said.append) as checkpoints:
            assert restore(checkpoints).step == 2
        assert said[1].endswith("delete-1-1); it stays")
    with CheckpointManager(run, report=said.append) as checkpoints:
        assert checkpoints.steps() == [2]
    assert said[2].startswith("removed .tmp-delete-1-1 in ") and len(said) == 3


def test_a_group_that_shares_a_run_shares_its_lock(tmp_path):
    before = os.umask(0o002)
    try:
        with CheckpointManager(tmp_path):
            assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_run_folder_that_is_deleted_is_made_and_locked_again(tmp_path):
    run, said = tmp_path / "run", []
    with CheckpointManager(run, report=said.append) as checkpoints:
        save(checkpoints, 1)
        checkpoints.beside_steps(lambda: (run / "config.json").touch())
        shutil.rmtree(run)
        with pytest.raises(ValueError, match="was moved, deleted or replaced since"):
            restore(checkpoints)
        save(checkpoints, 2)
        assert checkpoints.steps() == [2] and restore(checkpoints).step == 2
        assert (run / "config.json").exists()
        (line,) = said
        assert line.startswith(f"{run} was deleted or replaced during the run: ")
        _, _, err = run_child(HOLD, run)
        assert f") is training in {run}: " in err
        # It is moved away, and back when another one has been made in its place.
        run.rename(tmp_path / "first")
        save(checkpoints, 3)
        run.rename(tmp_path / "second")
        (tmp_path / "first").rename(run)
        save(checkpoints, 4)
        assert checkpoints.steps() == [2, 4]


def test_a_run_folder_that_another_run_has_taken_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    run = tmp_path / "run"
    with CheckpointManager(run, report=lambda line: None) as checkpoints:
        save(checkpoints, 1)
        shutil.rmtree(run)
        (run / "checkpoints" / "7").mkdir(parents=True)
        child = start_child(HOLD, run)
        child.wait_for("locked\n")
        try:
            with pytest.raises(SaveError, match=f"another process .*pid {child.pid}"):
                save(checkpoints, 2)
            assert checkpoints.steps() == [7]
        finally:
            child.kill()
            child.wait()


def test_a_run_that_has_ended_in_this_ones_place_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    run, moved = tmp_path / "run", tmp_path / "moved"
    with CheckpointManager(run, keep=1, report=lambda line: None) as checkpoints:
        save(checkpoints, 1)
        run.rename(moved)
        run_with_steps(run, 1, 2)
        for step in (3, 4):  # One that failed must not hold the lock either.
            with pytest.raises(SaveError, match="has the steps of another run"):
                save(checkpoints, step)
        assert checkpoints.steps() == [1, 2]
        # Its own folder goes on: without its lock, and copied to another disk.
        shutil.rmtree(run)
        moved.rename(run)
        (run / ".lock").unlink()
        save(checkpoints, 5)
        shutil.copytree(run, moved)
        shutil.rmtree(run)
        assert not checkpoints.has_folder()
        moved.rename(run)
        assert not checkpoints.has_folder()
        save(checkpoints, 6)
        assert checkpoints.has_folder()
        assert checkpoints.steps() == [6] and restore(checkpoints).step == 6


def test_a_run_folder_that_is_moved_while_a_step_is_written(tmp_path, monkeypatch):
    """TensorStore makes what is missing again, and writes the rest of the step there."""
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    run, moved, said = tmp_path / "run", tmp_path / "moved", []
    finish_writes = arrays.finish_writes

    def moves_once(*arguments):
        finish_writes(*arguments)
        if not moved.exists():
            run.rename(moved)
            ignore = shutil.ignore_patterns(".lock", "1")
            shutil.copytree(moved, run, ignore=ignore)

    with CheckpointManager(run, report=said.append) as checkpoints:
        save(checkpoints, 1)
        monkeypatch.setattr(arrays, "finish_writes", moves_once)
        save(checkpoints, 2)
        save(checkpoints, 3)
        assert checkpoints.steps() == [2, 3] and list_steps(moved) == [1]
    assert "was moved or deleted during the save); " in said[0] and len(said) == 2


def test_a_folder_of_steps_that_is_replaced_goes_on_unless_another_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    run, disk, said = tmp_path / "run", tmp_path / "disk", []
    steps = run / "checkpoints"
    run_with_steps(tmp_path / "other", 3, 4, 9)
    with CheckpointManager(run, keep=1, report=said.append) as checkpoints:
        save(checkpoints, 1)
        shutil.rmtree(steps)
        save(checkpoints, 2)
        assert checkpoints.steps() == [2]
        # Its own steps, moved to another disk during the run.
        shutil.copytree(steps, disk)
        shutil.rmtree(steps)
        steps.symlink_to(disk)
        save(checkpoints, 5)
        assert checkpoints.steps() == [5] and (disk / ".lock").is_file()
        assert len(said) == 2 and all(f"{steps} was deleted" in line for line in said)
        # Those of another run, whose steps it would move away or delete.
        steps.unlink()
        steps.symlink_to(tmp_path / "other" / "checkpoints")
        for step in (6, 7):
            with pytest.raises(SaveError, match="has the steps of another run"):
                save(checkpoints, step)
        assert list_steps(tmp_path / "other") == [3, 4, 9]
        # A file in its place, as in that of a folder above it.
        steps.unlink()
        run.rename(tmp_path / "away")
        run.touch()
        with pytest.raises(SaveError, match="8 cannot be written"):
            save(checkpoints, 8)


def test_no_save_writes_where_an_earlier_start_may_still_write(tmp_path, monkeypatch):
    names = []
    make = CheckpointManager._make
    monkeypatch.setattr(
        CheckpointManager,
        "_make",
        lambda self, folder, items: (names.append(folder), make(self, folder, items)),
    )
    for _ in range(2):
        with CheckpointManager(tmp_path / "run") as checkpoints:
            save(checkpoints, 1)
        shutil.rmtree(tmp_path / "run")
    assert len(names) == len(set(names)) == 2


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    scan, failures, said = os.scandir, [errno.ESTALE], []

    def scandir(path):
        if str(path).endswith("params") and failures:
            raise OSError(failures.pop(), "Stale file handle", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with CheckpointManager(tmp_path / "run", report=said.append) as checkpoints:
        save(checkpoints, 1)
        assert not failures and said[0].endswith("trying again")
        assert restore(checkpoints).step == 1


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot be written to.*--train\.run-dir"):
        CheckpointManager(tmp_path / "file/run")


def test_a_folder_that_training_would_spoil_is_refused(tmp_path, monkeypatch):
    run = run_with_steps(tmp_path / "run", 1)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    others = ("config.json", "report.html", "loss.png", "texts.json", "metrics.jsonl")
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text('{"train": "station"}')
    (tmp_path / "build").mkdir()
    (tmp_path / "build/.lock").write_text("of another program\n")
    for folder, words in (
        *((tmp_path / n, f"has a {n} that is not a run's") for n in others),
        (tmp_path / "build", r"build/\.lock is not the lock of a run"),
        (run / "checkpoints/1/params", "params is inside of a step, which"),
        (run / "checkpoints/1", "1 is a step, which would be damaged"),
        (run / "checkpoints", f"is inside of a run: the run folder is {run}$"),
        (model, "is a Hugging Face model, whose config.json a run would overwrite"),
    ):
        names = sorted(folder.iterdir())
        with pytest.raises(ValueError, match=words):
            CheckpointManager(folder)
        assert sorted(folder.iterdir()) == names
    monkeypatch.chdir(tmp_path)
    for name, words in (
        ("gs://bucket/run", "is a URL, and it must be a path of this machine"),
        ("~/run", "begins with ~, which the shell has not expanded"),
        ("run/checkpoints/7", f"is inside of a run: the run folder is {run}$"),
    ):
        with pytest.raises(ValueError, match=words):
            CheckpointManager(name)
        assert not os.path.lexists(name)


def test_a_folder_that_somebody_has_made_for_a_run_stays(tmp_path):
    """With its permissions; one that the run has made goes if nothing was saved."""
    (tmp_path / "made").mkdir()
    for name in ("made", "new"):
        with CheckpointManager(tmp_path / name):
            assert (tmp_path / name / ".lock").exists()
    assert list(tmp_path.rglob("*")) == [tmp_path / "made"]


def test_fresh_moves_the_earlier_run_aside(tmp_path):
    run = run_with_steps(tmp_path, 1, 2)
    (run / "metrics.jsonl").write_text("{}\n")
    reported = []
    for number in (1, 2):
        with CheckpointManager(run, fresh=True, report=reported.append) as checkpoints:
            assert checkpoints.steps() == [] and restore(checkpoints) is None
            save(checkpoints, number)
    assert (run / "old-1/metrics.jsonl").read_text() == "{}\n"
    assert not (run / "metrics.jsonl").exists()
    assert list_steps(run / "old-1") == [1, 2]
    assert list_steps(run / "old-2") == [1]
    assert len(reported) == 2 and "old-2" in reported[1]
    assert find_runs(tmp_path) == [run]
    assert move_aside(run).name == "old-3"


def test_odd_files_in_a_run_folder_are_in_nobodys_way(tmp_path, monkeypatch):
    run = run_with_steps(tmp_path, 1)
    os.mkfifo(run / "checkpoints/.tmp-2-1")
    (run / "checkpoints/.tmp-notes").mkdir()  # no name of ours
    (run / "old-1").symlink_to("nowhere")
    with (run / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # needs no space
    (run / "checkpoints/0").mkdir()
    with CheckpointManager(run, keep=1, report=lambda line: None) as checkpoints:
        restore(checkpoints)
        save(checkpoints, 2)
        assert checkpoints.steps() == [0, 2]
    with CheckpointManager(run, fresh=True, report=lambda line: None) as checkpoints:
        assert checkpoints.steps() == [] and list_steps(run / "old-2") == [0, 2]
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [".tmp-notes"]
    with pytest.raises(ValueError, match="levels deep"):
        CheckpointManager(tmp_path / ("x/" * 1000))
    # With LC_ALL=C and without its UTF-8 mode, Python takes such a name for this.
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(ValueError, match=r"not ascii, as which Python.*PYTHONUTF8=1"):
        CheckpointManager(tmp_path / "\udcc3\udcbc")


def test_fresh_copies_what_cannot_be_renamed(tmp_path, monkeypatch):
    """The run was begun anew over what had stayed, and its config replaced."""
    run = run_with_steps(tmp_path, 1)
    (run / "tensorboard").mkdir()
    for name in ("metrics.jsonl", "tensorboard/events", "config.json"):
        (run / name).write_text(name)

    def renaming(path, target, rename=Path.rename):
        if path == run / "tensorboard":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renaming)
    with CheckpointManager(run, fresh=True, report=lambda line: None):
        for name in ("metrics.jsonl", "tensorboard/events", "config.json"):
            assert (run / "old-1" / name).read_text() == name
            assert not (run / name).exists()


def test_fresh_moves_metrics_without_steps_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('x\n{"kind": "event", "step": 0}\n')
    with CheckpointManager(tmp_path, fresh=True, report=lambda line: None):
        assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "old-1/metrics.jsonl").exists()
    # The log was deleted too.
    (tmp_path / "report.html").touch()
    (tmp_path / "config.json").write_text('{"model": {}, "data": {}, "train": {}}')
    with CheckpointManager(tmp_path, fresh=True, report=lambda line: None):
        assert not (tmp_path / "config.json").exists()
    assert (tmp_path / "old-2/report.html").exists()


@pytest.mark.parametrize("name", ["a\\b", "gs:/run", "s3:"])
def test_a_name_under_which_nothing_can_be_saved_is_refused_at_the_start(
    tmp_path, name
):
    """TensorStore takes them for other paths, and writes there."""
    with pytest.raises(ValueError, match="TensorStore reads as another path"):
        CheckpointManager(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_run_folder_whose_files_would_have_too_long_paths_is_refused(tmp_path):
    path = tmp_path
    while len(str(path)) < 4000:
        path /= "d" * min(200, 4000 - len(str(path)))
    with pytest.raises(ValueError, match=r"bytes, and its files need 160 more"):
        CheckpointManager(path)
    assert not list(tmp_path.iterdir())


def test_a_new_run_folder_has_its_name_on_the_disk(tmp_path, monkeypatch):
    """Otherwise a power cut may take it, with steps that are on the disk."""
    sync = mock.Mock(side_effect=durable.sync)
    monkeypatch.setattr(durable, "sync", sync)
    with CheckpointManager(tmp_path / "a/b"):
        synced = {call.args[0] for call in sync.call_args_list}
    assert {tmp_path, tmp_path / "a", tmp_path / "a/b"} <= synced
