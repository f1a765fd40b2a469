"""Keeps a conversation in a file until the chat ends in order.

A terminal that is closed, a kill or a power cut ends it before `/save`.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from jaxlm.chat import transcript
from jaxlm.infer.conversation.conversation import Message

_NAME = re.compile(r"chat-([0-9]+)-[0-9a-f]{8}\.json")


class Unsaved:
    """The messages of this process that are in no file of the person's."""

    def __init__(self, folder: Path | None):
        """Writes nothing yet; `folder` is None if nothing can be kept."""
        name = f"chat-{os.getpid()}-{secrets.token_hex(4)}.json"
        self._path = None if folder is None else folder / name
        self._known: list[Message] = []

    def keep(self, messages: Sequence[Message]) -> None:
        """Writes messages that are not yet saved; a disk that is full keeps none."""
        if self._path is None or list(messages) == self._known:
            return
        if all(message["role"] == "system" for message in messages):
            self.forget()
            return
        self._known = list(messages)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            transcript.write(messages, self._path)

    def forget(self, messages: Sequence[Message] = ()) -> None:
        """Removes the file: the messages are saved, or the chat has ended."""
        self._known = list(messages)
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def conversations_folder() -> Path | None:
    """Returns the folder of such files; None if the user has no home folder."""
    try:
        root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return Path(root) / "jaxlm" / "conversations"


def not_ended(folder: Path | None) -> Path | None:
    """Returns the newest conversation of a process that is gone; None if none is."""
    if folder is None or not folder.is_dir():
        return None
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and not _is_running(int(match[1])):
                found.append(path)
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True
