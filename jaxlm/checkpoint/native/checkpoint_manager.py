"""Saves and restores the checkpoints of the run that this process trains.

Of several processes each writes its parts of the arrays, and they wait for each other
between the stages of a save.

Orbax writes the arrays of a step in the background into a temporary folder. All files
are hashed and synced to disk, and a rename commits the step: a folder with the name of
a step is complete. It contains `params/`, `opt_state/` and
perhaps `spikes/` (Orbax), `tokenizer/`, `meta.json` and `manifest.json`.
`checkpoint_reader.py` opens a step for reading only.
"""

import asyncio
import functools
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.finite import first_not_finite
from jaxlm.checkpoint.native import (
    arrays,
    compatible,
    integrity,
    run_folder,
    step_folder,
)
from jaxlm.checkpoint.native.run_lock import RunLock
from jaxlm.checkpoint.native.save_error import (
    SaveError,
    StateNotFinite,
    save_failed,
)
from jaxlm.checkpoint.native.step_folder import Restored
from jaxlm.checkpoint.opened import print_to_stderr
from jaxlm.config import Config
from jaxlm.fields import to_dict
from jaxlm.files import durable
from jaxlm.sharding.processes import ALONE, Processes, ProcessFailed
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

RETRY_SECONDS = 1.0


class CheckpointManager:
    """Saves and restores the checkpoints of the run that this process trains.

    Use it as a context manager, or call `close`: otherwise a save that is in progress
    when the program ends may be lost.
    """

    def __init__(
        self,
        run_dir: str | Path,
        keep: int = 2,
        keep_every: int = 0,
        *,
        fresh: bool = False,
        report: Callable[[str], None] = print_to_stderr,
        processes: Processes = ALONE,
    ):
        """Creates and locks the run folder, and cleans up after a killed process.

        Args:
          run_dir: the run folder; created if it does not exist.
          keep: number of newest steps to keep, at least 1.
          keep_every: steps that are multiples of this are never deleted, nor those
            that were multiples of it when they were saved; 0: none.
          fresh: moves an earlier run in the folder to `old-N/`.
          report: gets each line that a person should see.
          processes: those of the run, which all make one of these. The first of them
            does what is done once.

        Raises:
          ValueError: if the folder is not writable, or another run trains in it, or
            not all processes see the same folder.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must be kept")
        self.run = run_folder.named_folder(run_dir)
        self._keep, self._keep_every, self._report = keep, keep_every, report
        self._handler = arrays.new_handler()
        self._thread: threading.Thread | None = None
        self._errors: list[BaseException] = []  # at most one, to be raised
        self._at_exit = weakref.finalize(self, _tell, self._errors, report)
        # Whether the arrays may be overwritten, and whether the save had ended by then.
        self._copied, self._has_not_begun = threading.Event(), False
        self._last: int | None = None  # the step that this process saved or restored
        self._manifest = b""  # that of this step
        self._saves, self._is_closed = 0, False
        self._lock: RunLock | None = None
        self._write_beside: Callable[[], None] | None = None
        self._processes = processes
        owner = processes.of_first("run folder", lambda: self._start(fresh))
        self._start_id = owner.rpartition("\n")[2]
        processes.together("shared run folder", lambda: self._check_shared(owner))

    def _check_shared(self, owner: str) -> None:
        """Raises ValueError if this is not the folder that process 0 has locked."""
        if self._processes.is_first:
            return
        lock = self.run / run_folder.LOCK
        if not lock.is_file() or lock.read_text() != owner:
            raise ValueError(
                f"{self.run} is not the folder that process 0 has there: choose a "
                "--train.run-dir on a file system that all hosts share"
            )

    def _start(self, fresh: bool) -> str:
        self._was_there = self.run.exists()
        self._lock = RunLock(self.run)
        run_folder.remove_leftovers(self.run, self._report)
        if fresh and run_folder.has_history(self.run):
            self._move_all_aside("")
        return self._lock.owner

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save in progress and unlocks the run folder.

        A folder in which nothing was written is removed, unless it was there before.

        Raises:
          SaveError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._is_closed = True
            if self._lock is not None:
                if self._lock.is_held():
                    run_folder.remove_unused(self.run, keep=self._was_there)
                self._lock.release()

    def steps(self) -> list[int]:
        """Lists the committed steps in ascending order, readable or not."""
        list_steps = functools.partial(run_folder.list_steps, self.run)
        return self._processes.of_first("steps", list_steps)

    def has_folder(self) -> bool:
        """Whether this object has locked what is in the place of the run folder now.

        It is False, in process 0, after the folder was replaced and until the next
        save.
        """
        return self._lock is not None and self._lock.is_in_place()

    def _check_open(self) -> None:
        if self._is_closed:  # Another process may have the run folder since then.
            raise ValueError(f"the CheckpointManager of {self.run} is closed")

    def _check_place(self) -> None:
        """Raises ValueError if something else is in the place of the run folder now.

        A text, or a large state, takes hours to read.
        """
        if self._lock is not None and not self._lock.is_in_place():
            raise ValueError(
                f"{self.run} was moved, deleted or replaced since this start has "
                "locked it: start again"
            )

    def beside_steps(self, write: Callable[[], None]) -> None:
        """Calls a function that writes files into the run folder, in process 0.

        It is called now, and in each save that finds the folder replaced or gone.

        Raises:
          ValueError: if it is replaced or gone now.
        """
        if self._processes.is_first:
            self._check_place()
            write()
            self._write_beside = write

    def wait(self) -> None:
        """Waits until no save is in progress.

        Raises:
          SaveError: if the last save failed, as did its second attempt where `save`
            makes one. It is raised once.
          StateNotFinite: as `save`, likewise.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._errors:
            raise self._errors.pop()

    def save(
        self,
        step: int,
        params: Params,
        opt_state: Any,
        spikes: Any = None,
        *,
        config: Config,
        tokenizer: Tokenizer,
        data_fingerprint: str,
    ) -> None:
        """Starts saving a state and returns when its arrays may be overwritten.

        A step that this object has just saved or restored is not written again. Steps
        after the restored one belong to an abandoned continuation of the run, and all
        that are there if nothing was restored to another run: they are moved to
        `RUN/old-N/`. A save that fails is tried once more, unless the arrays
        are spread over several processes: none of them could write all. A run folder
        that was deleted is made again.

        Args:
          step: number of optimizer steps that led to the state.
          params: nested dict of arrays.
          opt_state: any tree of arrays.
          spikes: any tree of arrays, or None if there are none.
          config: the config of the whole run.
          tokenizer: saved beside the arrays.
          data_fingerprint: identifies the text and the order of its rows.

        Raises:
          SaveError: if the previous save failed, or this one cannot start.
          StateNotFinite: if the previous state had NaN or infinities, or this one: it
            must not replace a good one.
        """
        if step < 0:
            raise ValueError(f"step is {step}: it must be at least 0")
        self._check_open()
        self.wait()
        if step == self._last:
            return
        state = {
            "params": arrays.own(arrays.flatten(params, "params")),
            "opt_state": arrays.own(arrays.flatten(opt_state, "opt_state")),
        }
        if spikes is not None:
            state["spikes"] = arrays.own(arrays.flatten(spikes, "spikes"))
        meta = {
            "format": step_folder.META_FORMAT,
            "step": step,
            "is_kept": self._keeps_for_good(step),
            "config": to_dict(config),
            "data_fingerprint": data_fingerprint,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "environment": compatible.environment((params, opt_state)),
            "arrays": {item: arrays.describe(flat) for item, flat in state.items()},
        }
        self._copied.clear()
        self._has_not_begun = False
        thread = threading.Thread(
            target=self._save_in_background,
            args=(state, meta, tokenizer),
            name=f"checkpoint-{step}",
        )
        try:
            thread.start()
        except RuntimeError as e:  # as at a limit of processes
            raise self._save_error(meta, e) from e
        self._thread = thread
        self._copied.wait()
        if self._has_not_begun:
            self.wait()

    def _save_in_background(
        self, state: dict[str, Any], meta: dict[str, Any], tokenizer: Tokenizer
    ) -> None:
        try:
            try:
                host = arrays.on_host(state)
            except Exception as e:  # There is no memory for it.
                raise self._save_error(meta, e) from e
            try:
                self._try_to_save(state, host, meta, tokenizer)
            except SaveError as e:
                if host is None:
                    raise
                self._copied.set()
                self._report(f"{e}; trying again")
                time.sleep(RETRY_SECONDS)
                self._try_to_save(dict(host), host, meta, tokenizer)
            self._delete_old()
        except BaseException as e:
            self._errors.append(e)  # raised by the next `wait` or `save`
            # Later errors are not for this `save`, however late it looks.
            self._has_not_begun = not self._copied.is_set()
        finally:
            self._copied.set()

    def _try_to_save(
        self,
        state: dict[str, Any],
        host: dict[str, Any] | None,
        meta: dict[str, Any],
        tokenizer: Tokenizer,
    ) -> None:
        step = meta["step"]
        # The name is the same in each process, and in no earlier start of the run, of
        # which a process that hung may still write. What a save that failed has left
        # may not be removable.
        self._saves += 1
        name = f"{run_folder.TEMPORARY}{step}-{self._start_id}-{self._saves}"
        temporary = self._folder(name)
        try:
            files = self._write(temporary, state, host, meta, tokenizer)
            commit = functools.partial(self._commit, temporary, step, files)
            self._processes.of_first("commit", commit)
            self._last = step
        except StateNotFinite:
            if self._processes.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        except Exception as e:
            # A partial step is useless, and its space may be needed.
            if self._processes.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._save_error(meta, e) from e

    def _save_error(self, meta: dict[str, Any], error: Exception) -> SaveError:
        needed = sum(arrays.num_bytes(d) for d in meta["arrays"].values())
        return SaveError(save_failed(self._folder(meta["step"]), needed, error))

    def _keep_lock(self) -> None:
        """Makes and locks the run folder again if somebody has deleted it."""
        if self._lock is None:
            return
        gone = self.run
        if not self._lock.is_held():
            lock = RunLock(self.run, self._lock)
            self._lock, before = lock, self._lock
            before.release()
            if self._write_beside is not None:
                self._write_beside()
        elif self._lock.follow_steps(self._are_own):
            gone = self.run / run_folder.CHECKPOINTS
        else:
            return
        self._report(
            f"{gone} was deleted or replaced during the run: it is made or locked again"
        )

    def _are_own(self) -> bool:
        """Whether the steps in the run folder are those that this object knows."""
        manifest = self._folder(self._last or 0) / integrity.MANIFEST
        return manifest.is_file() and manifest.read_bytes() == self._manifest

    def _write(
        self,
        folder: Path,
        state: dict[str, Any],
        host: dict[str, Any] | None,
        meta: dict[str, Any],
        tokenizer: Tokenizer,
    ) -> dict[str, integrity.Entry]:
        """Writes all files of a step except the manifest, and returns its entries.

        Args:
          folder: a new folder.
          state: the arrays of each item; emptied.
          host: the same as NumPy arrays, if this process has all of them.
          meta: contents of `meta.json`, but for the hash of the state.
          tokenizer: saved beside the arrays.
        """
        each, first = self._processes.together, self._processes.of_first
        first("start of the save", lambda: self._make(folder, meta["arrays"]))
        if host is not None and arrays.on_one_device(state):
            # The usual case waits only for the copy. Otherwise Orbax gets the jax
            # arrays, because it writes each shard of an array as its own chunk.
            state.update(host)
            self._copied.set()
        shards = {} if host else integrity.shard_hashes(state)
        not_finite = None if host else first_not_finite(state)
        start = functools.partial(arrays.start_writes, self._handler, folder, state)
        futures = each("start of the writes", lambda: asyncio.run(start()))
        state.clear()  # releases the arrays on the device
        self._copied.set()
        each("writes", lambda: arrays.wait_for_writes(futures))
        not_finite = first_not_finite(host) if host else not_finite
        for name in filter(None, self._processes.gather("finite", not_finite)):
            raise StateNotFinite(meta["step"], name)
        meta["state_hash"] = host and integrity.state_hash(host)
        if host is None:
            hashes = self._processes.gather("hashes", shards)
            meta["shard_hashes"] = integrity.joined(hashes)
        first("end of the writes", lambda: self._finish(folder, meta, tokenizer))
        share = self._processes.index, self._processes.count
        hash_files = functools.partial(integrity.manifest_entries, folder, share)
        entries = self._processes.gather("files", each("hashing", hash_files))
        return integrity.joined(entries)

    def _make(self, folder: Path, items: dict[str, arrays.Description]) -> None:
        self._keep_lock()
        folder.mkdir()
        for item, description in items.items():
            if description:  # Orbax rejects a tree without arrays
                (folder / item).mkdir()

    def _finish(self, folder: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
        arrays.finish_writes(self._handler, folder, meta["arrays"])
        (folder / run_folder.TOKENIZER).mkdir()
        tokenizer.save(folder / run_folder.TOKENIZER)
        (folder / run_folder.META).write_text(json.dumps(meta, indent=1) + "\n")

    def _commit(
        self, temporary: Path, step: int, files: dict[str, integrity.Entry]
    ) -> None:
        if not self.has_folder():
            # TensorStore makes folders again that are missing: a part is elsewhere.
            raise ValueError(f"{self.run} was moved or deleted during the save")
        integrity.write_manifest(temporary, files)
        # Steps that are there before anything was restored are of another run, and
        # would be deleted as older steps of this one.
        newest = -1 if self._last is None else min(self._last, step - 1)
        self._move_aside_after(newest)
        self._manifest = (temporary / integrity.MANIFEST).read_bytes()
        durable.rename(temporary, self._folder(step))

    def _delete_old(self) -> None:
        """Deletes steps that need not be kept. Called only after a commit."""
        if not self._processes.is_first:
            return
        try:
            old = run_folder.list_steps(self.run)[: -self._keep]
            for step in filter(self._is_deletable, old):
                run_folder.remove_step(self.run, step, self._saves, self._report)
        except OSError as error:  # The step is saved: the next one may delete them.
            self._report(
                f"old steps in {self.run} cannot be deleted "
                f"({run_folder.reason(error)}); they take space, and the run goes on"
            )

    def _keeps_for_good(self, step: int) -> bool:
        return self._keep_every > 0 and step % self._keep_every == 0

    def _is_deletable(self, step: int) -> bool:
        """Whether an old step is one, is of this run still, and need not be kept.

        Raises:
          OSError: if that cannot be read now.
        """
        if self._keeps_for_good(step):
            return False
        if not (self._folder(step) / integrity.MANIFEST).is_file():
            return False  # a folder or a file that somebody has put there
        # The command that goes on may lack the flag with which a step was saved.
        if step_folder.is_kept(self._folder(step)):
            return False
        return self.has_folder()  # Deleting those before may have taken long.

    def _folder(self, name: int | str) -> Path:
        return self.run / run_folder.CHECKPOINTS / str(name)

    def restore(
        self,
        params: Any,
        opt_state: Any,
        spikes: Any = None,
        *,
        config: Config,
        tokenizer_fingerprint: str,
        data_fingerprint: str,
        step: int | None = None,
    ) -> Restored | None:
        """Restores a whole state, bit for bit as it was saved.

        Args:
          params: `jax.ShapeDtypeStruct`s (or arrays), nested as the parameters. An
            array is put on the sharding given here, whatever mesh it was saved from.
          opt_state: the same for the optimizer state, in its own structure.
          spikes: the same for the history of spikes; taken as it is for a checkpoint
            without one, of a run in which spikes were not skipped yet.
          config: the config of the run that continues; it must equal that of the
            checkpoint except for fields that do not change the numbers.
          tokenizer_fingerprint: must be that of the checkpoint.
          data_fingerprint: must be that of the checkpoint.
          step: the step to restore; None means the newest one that is intact.

        Returns:
          The state, or None if `step` is None and the run has no steps.

        Raises:
          NoUsableCheckpoint: if there are steps but none can be read.
          ValueError: if there is no such step, or the config, the data, the tokenizer,
            a shape or a dtype differs from the checkpoint; and if the run folder was
            moved or replaced.
        """
        self._check_open()
        self.wait()
        self._processes.of_first("place", self._check_place)
        steps = self.steps()
        if step is None and not steps:
            return None
        if step is not None and step not in steps:
            raise ValueError(run_folder.no_such_step(self.run, step, steps))
        read = functools.partial(
            step_folder.read_state,
            params=params,
            opt_state=opt_state,
            spikes=spikes,
            config=config,
            tokenizer_fingerprint=tokenizer_fingerprint,
            data_fingerprint=data_fingerprint,
            report=self._report,
            processes=self._processes,
        )

        def read_together(folder: Path) -> Restored:
            try:
                return self._processes.together("restoring", lambda: read(folder))
            except ProcessFailed as error:
                raise step_folder.UnreadableStep(str(error)) from error

        candidates = reversed(steps) if step is None else [step]
        folders = [self._folder(number) for number in candidates]
        restored = step_folder.first_readable(folders, read_together, self._report)
        self._last = restored.step
        manifest = self._folder(restored.step) / integrity.MANIFEST
        self._manifest = manifest.read_bytes()
        return restored

    def move_aside_after(self, step: int) -> Path | None:
        """Moves later steps, of an abandoned continuation of the run, to `RUN/old-N/`.

        Returns:
          The new folder, in process 0; None if there are no such steps.

        Raises:
          ValueError: if the run folder was moved or replaced.
        """

        def move() -> Path | None:
            if self._processes.is_first:
                self._check_place()
            return self._move_aside_after(step)

        return self._processes.together("moving aside", move)

    def move_all_aside(self, why: str) -> None:
        """Moves all that an earlier run has left to `RUN/old-N/`, in process 0.

        Args:
          why: the end of the line that tells it.

        Raises:
          ValueError: if the run folder was moved or replaced.
        """
        if self._processes.is_first:
            self._check_place()
            self._move_all_aside(f": {why}")

    def _move_all_aside(self, why: str) -> None:
        old = run_folder.move_aside(self.run)
        self._report(f"moved the earlier run in {self.run} to {old}{why}")

    def _move_aside_after(self, step: int) -> Path | None:
        later = [n for n in run_folder.list_steps(self.run) if n > step]
        if not later or not self._processes.is_first:
            return None
        old = run_folder.move_aside(self.run, later)
        names = ", ".join(map(str, later))
        why = f"the run continues from {step}" if step >= 0 else "none was restored"
        self._report(f"moved steps {names} to {old}: {why}")
        return old


def _tell(errors: list[BaseException], report: Callable[[str], None]) -> None:
    """Tells of a failed save that nobody has waited for, when the program ends."""
    for error in errors:
        report(f"{error} (close the CheckpointManager before the program ends)")
