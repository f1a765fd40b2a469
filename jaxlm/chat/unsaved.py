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
from jaxlm.files import durable
from jaxlm.infer.conversation.conversation import Message

_NAME = re.compile(r"chat-[0-9a-f]{16}\.json")


class Unsaved:
    """The messages of this process that are in no file of the person's.

    Their file stays open, and locked, which the system ends with the process. Process
    numbers do not tell: the chat of a container has the same one each time.
    """

    def __init__(self, folder: Path | None):
        """Writes nothing yet; `folder` is None if nothing can be kept."""
        name = f"chat-{secrets.token_hex(8)}.json"
        self._path = None if folder is None else folder / name
        self._known: list[Message] = []
        self._lock = contextlib.ExitStack()

    def keep(self, messages: Sequence[Message]) -> None:
        """Writes messages that are not yet saved.

        Raises:
          OSError: if they cannot be written.
        """
        if self._path is None or list(messages) == self._known:
            return
        if all(message["role"] == "system" for message in messages):
            self.forget()
            return
        with contextlib.ExitStack() as lock:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with durable.replacing(self._path) as file:
                file.write(transcript.encoded(messages))
                lock.callback(os.close, os.dup(file.fileno()))
            self._lock.close()
            self._lock = lock.pop_all()
        self._known = list(messages)

    def forget(self, messages: Sequence[Message] = ()) -> None:
        """Removes the file: the messages are saved, or the chat has ended."""
        self._known = list(messages)
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._lock.close()


def conversations_folder() -> Path | None:
    """Returns the folder of such files; None if the user has no home folder."""
    try:
        root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return Path(root) / "jaxlm" / "conversations"


def not_ended(folder: Path | None) -> list[Path]:
    """Returns the conversations of processes that are gone, the newest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir() if folder is not None else ():
            if _NAME.fullmatch(path.name) and not durable.is_locked(path):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]
