"""Opens a jaxlm run, or one step of it, for reading only.

`checkpoint_manager.py` saves and restores the run that a process trains.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm import tree
from jaxlm.checkpoint.native import arrays, integrity, run_folder, step_folder
from jaxlm.checkpoint.native.integrity import UnreadableStep
from jaxlm.checkpoint.opened import Kind
from jaxlm.config import ModelConfig
from jaxlm.fields import from_dict
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.kinds import read_saved_tokenizer
from jaxlm.types import Params

_PARTS = ("params", run_folder.TOKENIZER, run_folder.META)
_TRIES = 20


class NativeCheckpoint:
    """One step, opened for reading: nothing in its folder is locked or changed."""

    kind: Kind = "jaxlm"
    family = "jaxlm"

    def __init__(self, path: Path, report: Callable[[str], None]):
        """Chooses the step: for a run folder, the newest that is intact.

        Arguments and errors as `open_checkpoint`.
        """
        self.path, self._report = path, report
        self.step_folder, self._manifest, self._meta = _open_newest(path, report)
        self.config = from_dict(
            ModelConfig,
            self._meta["config"].get("model"),
            f"model of {self.step_folder}",
        )

    def params(self, *, dtype: Any = None, shardings: Any = None) -> Params:
        """As `Checkpoint.params`; raises ValueError if the step has been deleted."""
        by_path = {} if shardings is None else tree.flatten(shardings)
        stored = self._meta["arrays"]["params"]
        if dtype is None and any(kind == "float64" for kind, _ in stored.values()):
            self._report("float64 weights are read as float32")
        wanted = tree.nest(arrays.abstract(stored, by_path))
        with self._same_step():
            params = step_folder.read_item(
                self.step_folder, self._meta, "params", wanted
            )
        return params if dtype is None else tree.cast_floating(params, dtype)

    def tokenizer(self) -> Tokenizer:
        """As `Checkpoint.tokenizer`; raises ValueError if the step has been deleted."""
        with self._same_step():
            return read_saved_tokenizer(self.step_folder / run_folder.TOKENIZER)

    def files(self) -> list[Path]:
        """Returns the manifest, which contains the hashes of all other files."""
        return [self.step_folder / integrity.MANIFEST]

    @contextlib.contextmanager
    def _same_step(self) -> Iterator[None]:
        """Wraps reading: raises ValueError if the step was deleted or replaced.

        A run in training deletes its older steps, and a run that starts over with
        --fresh saves another step under the same number.
        """
        try:
            yield
        except Exception:
            self._check_same_step()
            raise
        self._check_same_step()

    def _check_same_step(self) -> None:
        [file] = self.files()
        if not file.is_file() or file.read_bytes() != self._manifest:
            raise ValueError(
                f"{self.step_folder} has been deleted or replaced since it was opened: "
                "is a run training there? Try again, or give a step that it keeps"
            )


def _open_newest(
    path: Path, report: Callable[[str], None]
) -> tuple[Path, bytes, dict[str, Any]]:
    """Opens the newest step that is intact, as `_open_step`.

    A run in training may delete all that were there, after it has saved others.
    """
    folders = run_folder.candidates(path)
    for _ in range(_TRIES):
        try:
            return step_folder.first_readable(folders, _open_step, report)
        except step_folder.NoUsableCheckpoint:
            before, folders = folders, run_folder.candidates(path)
            if folders == before:
                raise
    raise ValueError(f"{path} saves faster than its steps are read: try again")


def _open_step(folder: Path) -> tuple[Path, bytes, dict[str, Any]]:
    """Verifies a step folder; returns it with its manifest and its meta.json."""
    try:
        meta = step_folder.open_step(folder)
        integrity.verify(folder, _PARTS)
        return folder, (folder / integrity.MANIFEST).read_bytes(), meta
    except OSError as error:
        raise UnreadableStep(f"{error.strerror}: {error.filename}") from error
