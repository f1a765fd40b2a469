"""The run folder: its file names, and how a user's path is resolved to steps.

`RUN/checkpoints/STEP/` is a step, named by its plain number. While a step is being
written or deleted, its name begins with `.tmp-`: a rename commits it, or takes it away.
"""

import contextlib
import difflib
import errno
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.native import integrity
from jaxlm.files import durable
from jaxlm.files.bounded import read_bounded
from jaxlm.files.local_path import local_path
from jaxlm.files.strict_json import parse_object

CHECKPOINTS = "checkpoints"
META = "meta.json"
TOKENIZER = "tokenizer"
METRICS = "metrics.jsonl"
MAX_LOG_BYTES = 1 << 30  # about four million rows
TEMPORARY = ".tmp-"
LOCK = ".lock"
OWNER = "pid "  # how a lock begins
# What shows the course of a run.
_RECORD = (METRICS, "report.html", "loss.png")
# The files that a run writes and `move_aside` moves; the last says whose they are.
_RUN_FILES = (
    *(*_RECORD, "texts.json"),
    *("tensorboard", "wandb", "mlflow", "config.json"),
)
# Bytes of a path, and those that the longest one of a step has below the run folder.
_MAX_PATH, _BELOW = 4095, 160
_LEFTOVER = re.compile(
    rf"{re.escape(TEMPORARY)}((delete-)?[0-9]+-([0-9a-f]{{8}}-)?[0-9]+|probe-.*)"
)


def list_steps(run: Path) -> list[int]:
    """Lists the committed steps of a run folder in ascending order."""
    folder = run / CHECKPOINTS
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(n) for n in names if re.fullmatch(r"0|[1-9][0-9]*", n))


def remove_leftovers(run: Path, report: Callable[[str], None]) -> None:
    """Removes what a killed process left half written or half deleted.

    Args:
      report: gets a line with the names, and one for each that cannot be removed.
    """
    folder, removed = run / CHECKPOINTS, []
    for path in sorted([*run.glob(f"{TEMPORARY}*"), *folder.iterdir()]):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        try:
            remove(path)
            removed.append(path.name)
        except OSError as error:
            report(f"{path} cannot be removed ({reason(error)}); it stays")
    if removed:
        report(
            f"removed {', '.join(removed)} in {run}: left by a run that was "
            "killed while saving or deleting"
        )


def remove_step(
    run: Path, step: int, number: int, report: Callable[[str], None]
) -> None:
    """Deletes a step that is no longer needed; a failure is reported, and it stays.

    Files that another process has open cannot be removed on some file systems.

    Args:
      number: makes the name unique that it has while it is deleted.
    """
    # Renamed first, so that a kill cannot leave half a step.
    doomed = run / CHECKPOINTS / f"{TEMPORARY}delete-{step}-{number}"
    try:
        durable.rename(run / CHECKPOINTS / str(step), doomed)
        remove(doomed)
    except OSError as error:
        report(
            f"the old step {step} in {run} cannot be deleted ({reason(error)}); it "
            "takes space, and the run goes on"
        )


def reason(error: OSError) -> str:
    """Returns what the system says of an error, and the file."""
    return f"{error.strerror}: {error.filename}"


def remove(path: Path) -> None:
    """Deletes a folder, or a symbolic link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()  # also a pipe, which rmtree would wait for


def has_history(run: Path) -> bool:
    """Returns whether an earlier run has left steps, a log or a report in a folder."""
    return bool(list_steps(run)) or any((run / name).is_file() for name in _RECORD)


def config_values(run: Path) -> dict[str, Any]:
    """Returns the contents of config.json; nothing if it cannot be read."""
    path = run / "config.json"
    if path.is_file():
        with contextlib.suppress(ValueError, OSError):
            return parse_object(read_bounded(path, 16 << 20), str(path))
    return {}


def move_aside(run: Path, steps: list[int] | None = None) -> Path:
    """Moves the files of a run, or only some of its steps, to `RUN/old-N/`.

    Args:
      run: the run folder.
      steps: the steps to move, with a copy of the log, whose rows of them will be
        dropped; None moves all that the run has written.

    Returns:
      The new folder. It is a run folder too: its checkpoints can be loaded.
    """
    names = (f"old-{number}" for number in itertools.count(1))
    folders = [run, run / CHECKPOINTS]
    name = next(n for n in names if not any(os.path.lexists(f / n) for f in folders))
    old = run / name
    old.mkdir()
    if steps is not None:
        _copy_log(run / METRICS, old)
    if (run / CHECKPOINTS).is_symlink():
        # Perhaps to another disk, to which nothing can be renamed: steps stay there.
        (run / CHECKPOINTS / name).mkdir()
        (old / CHECKPOINTS).symlink_to(Path("..") / CHECKPOINTS / name)
    else:
        (old / CHECKPOINTS).mkdir()
    for step in list_steps(run) if steps is None else steps:
        part = f"{CHECKPOINTS}/{step}"
        _move(run / part, old / part)
    for part in _RUN_FILES if steps is None else ():
        if (run / part).exists():
            _move(run / part, old / part)
    return old


def _copy_log(log: Path, folder: Path) -> None:
    """Copies a log that is a file, and no hole of a terabyte; else `folder` is removed.

    Raises:
      OSError: if the disk has no room for it.
    """
    try:
        if log.is_file() and log.stat().st_size <= MAX_LOG_BYTES:
            shutil.copy(log, folder)
            durable.sync(folder / log.name)
    except OSError:
        shutil.rmtree(folder)
        raise


def _move(source: Path, target: Path) -> None:
    """Renames a file or a folder, or copies a folder that cannot be renamed.

    In a container, those of the image's layers cannot be renamed.
    """
    try:
        durable.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = target.with_name(f"{TEMPORARY}{target.name}-0")
        shutil.copytree(source, copy, symlinks=True)
        for path in copy.rglob("*"):
            durable.sync(path)
        durable.rename(copy, target)
        shutil.rmtree(source)


def named_folder(run_dir: str | Path) -> Path:
    """Returns the absolute path of a run folder that a person has named.

    Raises:
      ValueError: for a URL, for `~`, and in a working folder that was deleted.
    """
    path = local_path(run_dir, "the run folder")
    try:
        return path.absolute()
    except FileNotFoundError:
        raise ValueError(
            f"the run folder {path} is relative to the working folder, which was "
            "deleted: change to another one"
        ) from None


def check_free(run: Path) -> None:
    """Checks that training in a folder spoils nothing that is not a run's.

    Raises:
      ValueError: for a step of a run, the folder of its steps, and what is inside of
        them; and for a folder that is no run's, with files of the names of a run's,
        or with a lock of another program, which would be overwritten.
    """
    check_no_step(run)
    for lock in (run / LOCK, run / CHECKPOINTS / LOCK):
        if not _is_lock(lock):
            raise ValueError(
                f"{lock} is not the lock of a run, and would be overwritten: choose "
                "another --train.run-dir, or rename it"
            )
    values = config_values(run)
    if values.keys() & {"model_type", "architectures"}:
        raise ValueError(
            f"{run} is a Hugging Face model, whose config.json a run would overwrite: "
            "choose another --train.run-dir (--init-from reads a model)"
        )
    # A run that was killed before its first row has left its config.
    is_config = {"model", "data", "train"} <= values.keys()
    if is_config or list_steps(run) or _has_row(run / METRICS):
        return
    for name in _RUN_FILES:
        path = run / name
        is_empty_log = name == METRICS and path.is_file() and not path.stat().st_size
        if path.exists() and not (path.is_dir() or is_empty_log):
            raise ValueError(
                f"{run} has a {name} that is not a run's, and would be overwritten: "
                "choose another --train.run-dir, or rename it"
            )


def _is_lock(path: Path) -> bool:
    """Whether a file is a lock of ours, is empty, or is not there.

    What is no file is refused when it is locked.
    """
    if path.is_symlink() or not path.is_file():
        return True
    with contextlib.suppress(OSError), path.open("rb") as file:
        written = file.read(1000).strip(b"\0")  # A power cut leaves zeros.
        return not written or written.startswith(OWNER.encode())
    return True


def check_no_step(path: Path) -> None:
    """Checks that a path to write is not among the steps of a run.

    Raises:
      ValueError: for a step, the folder of a run's steps, and what is inside of them.
    """
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if all(os.path.isfile(folder / n) for n in (META, integrity.MANIFEST)):
            raise ValueError(
                f"{path} is {'' if folder == real else 'inside of '}a step, which "
                "would be damaged: give the run folder, or another one"
            )
        # Runs may lie in a folder of this name, and be called 1, 2 and so on.
        if folder.name == CHECKPOINTS and any(
            (folder / str(step) / META).is_file() for step in list_steps(folder.parent)
        ):
            raise ValueError(
                f"{path} is inside of a run: the run folder is {folder.parent}"
            )


def _has_row(metrics: Path) -> bool:
    """Whether a log begins with a row of a run, among lines that may be damaged."""
    if not metrics.is_file():
        return False
    with contextlib.suppress(OSError), metrics.open("rb") as file:
        for line in file.read(1 << 16).splitlines():
            with contextlib.suppress(ValueError):
                if {"kind", "step"} <= parse_object(line, "").keys():
                    return True
    return False


def probe_writable(run: Path) -> None:
    """Creates the run folder and checks that files can be created and renamed in it.

    Raises:
      ValueError: if the folder is not writable, has a name under which nothing can be
        saved, or is on a file system that cannot wait until names are on the disk.
    """
    try:
        str(run).encode()
    except UnicodeEncodeError:
        if (encoding := sys.getfilesystemencoding()) != "utf-8":
            raise ValueError(
                f"the run folder {run} has a name that is not {encoding}, as which "
                "Python reads it here: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
            ) from None
        raise ValueError(
            f"the name of the run folder {run} is not UTF-8: choose another with "
            "--train.run-dir"
        ) from None
    if "\\" in str(run) or {"gs:", "s3:"} & {*run.parts}:
        raise ValueError(
            f"the run folder {run} has a name that TensorStore reads as another path "
            "(a backslash, or a folder gs: or s3:): choose another with "
            "--train.run-dir, or rename the folder"
        )
    if len(run.parts) > 200:  # pathlib makes them by recursion
        raise ValueError(f"the run folder {run} is {len(run.parts)} levels deep")
    if (size := len(os.fsencode(run))) > _MAX_PATH - _BELOW:
        raise ValueError(
            f"the path of the run folder {run} has {size:,} bytes, and its files need "
            f"{_BELOW} more than the {_MAX_PATH:,} of this system: choose a shorter "
            "--train.run-dir"
        )
    try:
        new = [path for path in (run, *run.parents) if not path.exists()]
        (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for path in new:
            durable.sync(path.parent)
        for folder in (run, run / CHECKPOINTS):
            probe = folder / f"{TEMPORARY}probe-{os.getpid()}"
            moved = probe.with_name(f"{probe.name}-renamed")
            probe.write_bytes(b"probe")
            probe.rename(moved)
            moved.unlink()
            # TensorStore waits for its folders too, and some file systems cannot.
            durable.sync(folder, strict=True)
    except OSError as e:
        raise ValueError(
            f"the run folder {run} cannot be written to ({e.strerror}: "
            f"{e.filename or run}): choose another with --train.run-dir, or fix its "
            "permissions"
        ) from e


def is_new(path: Path) -> bool:
    """Whether a run may begin in a path.

    Nothing is there, or what one that has ended before its first step leaves: a lock,
    files by which it was tried whether it can write, and a folder without a step.
    """
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_dir():
        return False
    found = (child.name for child in path.iterdir())
    names = {name for name in found if not _LEFTOVER.fullmatch(name)}
    return names <= {LOCK, CHECKPOINTS} and not list_steps(path)


def remove_unused(run: Path, *, keep: bool) -> None:
    """Removes what a run folder holds if that is its lock and an empty folder.

    Args:
      keep: leave the run folder itself, which somebody has made for the run.
    """
    # It may be gone, or another process may begin to use it.
    with contextlib.suppress(OSError):
        if {path.name for path in run.iterdir()} == {LOCK, CHECKPOINTS}:
            (run / CHECKPOINTS).rmdir()
            (run / LOCK).unlink()
            if not keep:
                run.rmdir()


def find_runs(root: str | Path = "runs", depth: int = 4) -> list[Path]:
    """Finds the run folders with at least one step in or below `root`, newest first.

    The age is that of the last step. Folders more than `depth` levels below `root` are
    not searched, and of links only those to a run, perhaps on another disk.
    """
    by_place: dict[str, Path] = {}
    for run in sorted(_runs_below(Path(root), depth), key=Path.is_symlink):
        by_place.setdefault(os.path.realpath(run), run)
    return sorted(by_place.values(), key=_last_save, reverse=True)


def _last_save(run: Path) -> int:
    """Returns when a run saved last, in nanoseconds; 0 if it has no such step now.

    The folder of the steps is changed by starts that are refused, too.
    """
    times = [0]
    for step in list_steps(run):
        with contextlib.suppress(OSError):  # It is being deleted.
            manifest = run / CHECKPOINTS / str(step) / integrity.MANIFEST
            times.append(manifest.stat().st_mtime_ns)
    return max(times)


def newest_run() -> Path:
    """Returns the run below runs/ that was saved last.

    Raises:
      ValueError: if there is none.
    """
    runs = find_runs()
    if not runs:
        if begun := sorted(Path("runs").glob(f"*/{CHECKPOINTS}")):
            raise ValueError(
                f"{begun[0].parent} has no checkpoint yet: a run saves its first after "
                "--train.checkpoint-every steps, at its end, and when Ctrl-C stops it"
            )
        raise ValueError(
            "no run with a checkpoint below runs/: train one with `python train.py` "
            "(or `jaxlm train`), or name a run folder"
        )
    return runs[0]


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        return
    if list_steps(folder):
        yield folder
    elif depth > 0:
        for child in sorted(folder.iterdir()):
            if not child.name.startswith("."):
                # No further through a link: it may lead in a circle.
                yield from _runs_below(child, 0 if child.is_symlink() else depth - 1)


def candidates(path: str | Path) -> list[Path]:
    """Lists the step folders that a path refers to, in the order in which to try them.

    Args:
      path: a run folder (all its steps, newest first) or a step folder.

    Raises:
      ValueError: if it is neither; says what is there, and which runs are nearby.
    """
    path = Path(path)
    if path.name == CHECKPOINTS and not list_steps(path):  # a run may have this name
        path = path.parent
    if steps := list_steps(path):
        return [path / CHECKPOINTS / str(step) for step in reversed(steps)]
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        run = path.parent.parent
        if path.is_dir():
            return [path]
        if steps := list_steps(run):
            raise ValueError(no_such_step(run, int(path.name), steps))
    # A step folder that was copied elsewhere under another name.
    if (path / META).is_file() and (path / integrity.MANIFEST).is_file():
        return [path]
    raise ValueError(
        f"{path} is not a checkpoint: {_what_is_there(path)}{_runs_nearby(path)}; give "
        "a run folder, a step of one, a Hugging Face folder or a .gguf file"
    )


def no_such_step(run: Path, step: int, steps: list[int]) -> str:
    """Returns the message for a step that a run does not have."""
    return (
        f"{run} has no checkpoint of step {step}: it has steps "
        f"{', '.join(map(str, steps)) or '(none)'}"
    )


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "it does not exist"
    if not path.is_dir():
        return "it is a file"
    if (path / CHECKPOINTS).is_dir():
        return "its checkpoints folder has no complete step"
    names = sorted(p.name for p in path.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it contains {', '.join(names[:8])}{more}"


def _runs_nearby(path: Path) -> str:
    existing = path.absolute()
    while not existing.is_dir():
        existing = existing.parent
    # Shallow: a mistyped path must not start a search of the whole disk.
    runs = find_runs(existing, depth=2) or find_runs(existing.parent, depth=2)
    names = {min(os.path.relpath(run), str(run), key=len): run.name for run in runs}
    if not names:
        return "; there is no run folder nearby"
    alike = difflib.get_close_matches(path.name, names.values(), n=3, cutoff=0.4)
    best = sorted(names, key=lambda n: names[n] not in alike)[:3]
    return f"; run folders nearby: {', '.join(best)}"
