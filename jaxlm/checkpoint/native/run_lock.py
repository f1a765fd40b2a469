"""The lock of a run folder, and what it tells of the folder while a run trains.

A person can move, delete or replace the folder, or that of the steps, at any moment.
"""

import errno
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from jaxlm.checkpoint.native.run_folder import (
    CHECKPOINTS,
    LOCK,
    OWNER,
    check_free,
    list_steps,
    probe_writable,
)


class RunLock:
    """Keeps a second process from training in the same run folder.

    It is a POSIX record lock on `RUN/.lock`, and on the same name in `RUN/checkpoints`
    if that is a link. The system releases it when the process ends, however it ends,
    and child processes do not inherit it. The same process can still open a run folder
    twice.
    """

    def __init__(self, run: Path, earlier: "RunLock | None" = None):
        """Creates the folder and takes the lock.

        Args:
          run: the run folder.
          earlier: the lock of this process that is no longer in the folder. Steps that
            are there must then be those of its run.

        Raises:
          ValueError: if another process holds it (names its process id and host), if
            the folder cannot be written, or if it has the steps of another run.
        """
        self._path = run / LOCK
        self._descriptor: int | None = None
        self._of_target: int | None = None
        self._of_steps: int | None = None
        # A run that ends without a step deletes the file, perhaps after it was opened
        # here: a third process would then lock another file of this name.
        check_free(run)
        while self._descriptor is None:
            probe_writable(run)
            self._descriptor = self._locked(self._path)
            self._file = os.fstat(self._descriptor)
            if not self.is_held():
                self.release()
        if (run / CHECKPOINTS).is_symlink():  # The links of two runs can lead there.
            try:
                self._of_target = self._locked(run / CHECKPOINTS / LOCK)
            except ValueError:
                self.release()
                raise
        self._folder = os.stat(run)
        self._open_steps()
        if earlier is not None and list_steps(run) and not self._continues(earlier):
            self.release()
            raise ValueError(
                f"{run} was moved or deleted during the run, and has the steps of "
                "another run now: those are left alone"
            )
        os.ftruncate(self._descriptor, 0)
        # The same as before: the first folder may come back.
        self.owner = earlier.owner if earlier else _new_owner()
        """What the file says of this process: no other one has the second line."""
        os.pwrite(self._descriptor, self.owner.encode(), 0)
        if self._of_target is not None:
            os.pwrite(self._of_target, self.owner.encode(), 0)

    def follow_steps(self, are_own: Callable[[], bool]) -> bool:
        """Locks the folder of the steps where it is now; makes it again if it is gone.

        Args:
          are_own: tells whether the steps that are there now are those of this run.

        Returns:
          Whether it is another folder than before.

        Raises:
          ValueError: if it is that of another run, or as `__init__`.
        """
        folder = self._path.parent / CHECKPOINTS
        if _is_there(folder, self._steps):
            return False
        probe_writable(self._path.parent)
        if list_steps(self._path.parent) and not are_own():
            raise ValueError(
                f"{folder} is another folder than before, and has the steps of "
                "another run: those are left alone"
            )
        before, self._of_target = self._of_target, None
        if before is not None:
            os.close(before)
        if folder.is_symlink():
            self._of_target = self._locked(folder / LOCK)
            os.pwrite(self._of_target, self.owner.encode(), 0)
        self._open_steps()
        return True

    def _open_steps(self) -> None:
        """Opens the folder of the steps: else some file systems renumber it (FUSE)."""
        if self._of_steps is not None:
            os.close(self._of_steps)
        self._of_steps = os.open(self._path.parent / CHECKPOINTS, os.O_RDONLY)
        self._steps = os.fstat(self._of_steps)

    def _continues(self, earlier: "RunLock") -> bool:
        """Whether this is the folder of another lock, or what it was moved to."""
        assert self._descriptor is not None
        written = os.pread(self._descriptor, 1000, 0)
        if not written:  # the lock alone was deleted
            return os.path.samestat(self._folder, earlier._folder)
        return written == earlier.owner.encode()

    def _locked(self, path: Path) -> int:
        """Opens a file and locks it; raises as `__init__`."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags, 0o666)  # A group may share the run.
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, "it is not a regular file")
        except OSError as e:
            raise ValueError(
                f"{path} cannot be opened ({e.strerror}): fix its permissions (if "
                "nobody trains there, delete it), or choose another --train.run-dir"
            ) from e
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            written = os.pread(descriptor, 200, 0).decode(errors="replace")
            owner = written.partition("\n")[0].strip()
            os.close(descriptor)
            raise ValueError(
                f"another process ({owner or 'just starting'}) is training in "
                f"{path.parent}: wait for it, stop it, or choose another "
                "--train.run-dir"
            ) from e
        except OSError as e:
            os.close(descriptor)
            raise ValueError(
                f"{path} cannot be locked ({e.strerror}): choose a --train.run-dir on "
                "a file system with locks"
            ) from e
        return descriptor

    def is_held(self) -> bool:
        """Whether the file is still there: nobody has deleted or replaced it."""
        return _is_there(self._path, self._file)

    def is_in_place(self) -> bool:
        """Whether nobody has replaced the run folder or the folder of its steps."""
        steps = self._path.parent / CHECKPOINTS
        return self.is_held() and _is_there(steps, self._steps)

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        for descriptor in (self._descriptor, self._of_target, self._of_steps):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._of_target = self._of_steps = None


def _new_owner() -> str:
    return f"{OWNER}{os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(4)}"


def _is_there(path: Path, status: os.stat_result) -> bool:
    """Whether a path still leads to the file or folder of a status."""
    try:
        return os.path.samestat(os.stat(path), status)
    except (FileNotFoundError, NotADirectoryError):
        return False
