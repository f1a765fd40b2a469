"""Conversations in files: a JSON list of messages, each with a role and a content."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from jaxlm.checkpoint.native.run_folder import check_no_step
from jaxlm.files import durable
from jaxlm.files.bounded import read_bounded
from jaxlm.files.strict_json import parse
from jaxlm.infer.conversation.conversation import Message

_MAX_BYTES = 64 << 20  # No context is that long.


def save(messages: Sequence[Message], path: Path) -> None:
    """Writes messages to a file, which replaces what it has of the same conversation.

    Raises:
      ValueError: if it cannot be written, the file is something else, or the path is
        among the steps of a run.
    """
    check_no_step(path)
    if os.path.lexists(path):
        try:
            earlier = load(path)
        except ValueError:
            raise ValueError(
                f"{path} exists and is not a conversation: choose another name"
            ) from None
        if earlier and not _goes_on(earlier, messages):
            raise ValueError(
                f"{path} has another conversation, of {len(earlier)} messages: choose "
                "another name, or remove it"
            )
        path = path.resolve()  # Of a link, what it leads to is replaced.
    try:
        with durable.replacing(path) as file:
            file.write(encoded(messages))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def encoded(messages: Sequence[Message]) -> bytes:
    """Returns what a file of these messages has."""
    text = json.dumps(list(messages), indent=1, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _goes_on(earlier: Sequence[Message], messages: Sequence[Message]) -> bool:
    """Whether messages go on an earlier conversation; its last answer may be another.

    Many conversations begin with the same words, and with the same answer.
    """
    old, new = ([m for m in p if m["role"] != "system"] for p in (earlier, messages))
    answered = bool(old) and old[-1]["role"] == "assistant"
    same = len(old) - answered
    return len(new) >= len(old) > 0 and new[:same] == old[:same]


def load(path: Path) -> list[Message]:
    """Reads the messages of a file.

    Raises:
      ValueError: if it cannot be read, or is no list of messages.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file")
        messages = parse(read_bounded(path, _MAX_BYTES), str(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not isinstance(messages, list):
        raise ValueError(f"{path} holds no list of messages")
    for i, message in enumerate(messages):
        if not (
            isinstance(message, dict)
            and message.keys() >= {"role", "content"}
            and all(isinstance(value, str) for value in message.values())
        ):
            raise ValueError(
                f"{path}: message {i} is not an object of strings with a role and a "
                "content"
            )
    return messages
