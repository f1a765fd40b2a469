"""Reads the messages that a person types.

On a terminal, prompt_toolkit gives a line editor with history. Elsewhere each line of
the input is a message.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

PROMPT = "> "


class DraftDropped(KeyboardInterrupt):
    """Ctrl-C after something was typed: only that is given up."""


def line_editor() -> Callable[[], str]:
    """Returns a function that reads a message of one or more lines from the terminal.

    Enter sends the message. Alt-Enter, or Enter after a backslash, begins a new line; a
    paste of several lines is one message. The function raises EOFError for Ctrl-D,
    DraftDropped for Ctrl-C if something was typed, else KeyboardInterrupt. SIGTERM ends
    the program after the terminal was put back as it was.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            # A full disk or an odd character must not end the conversation.
            with contextlib.suppress(OSError, UnicodeError):
                super().store_string(string)

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    file = history_file()
    session = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=" " * len(PROMPT),
        key_bindings=keys,
        history=History(file) if file is not None else InMemoryHistory(),
    )
    was_typed = False

    def note(_: object) -> None:
        nonlocal was_typed
        was_typed = True

    session.default_buffer.on_text_changed += note

    was_ended = False

    def end() -> None:
        nonlocal was_ended
        was_ended = True
        if not session.app.is_done:
            session.app.exit()

    def handle_sigterm() -> None:
        # The editor's loop calls `end` between two steps, never within one.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)

    def read() -> str:
        nonlocal was_typed
        was_typed = False
        before = signal.getsignal(signal.SIGTERM)
        try:
            message = session.prompt(pre_run=handle_sigterm)
        except KeyboardInterrupt:
            if was_typed:
                raise DraftDropped from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        if was_ended:
            raise SystemExit(128 + signal.SIGTERM)
        return message.strip("\n")

    return read


def history_file() -> Path | None:
    """Returns the file of earlier messages, mode 0600; None if it cannot be written."""
    root = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = root / "jaxlm" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder.
        return None
    return path
