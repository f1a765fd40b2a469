"""The line editor: its keys and the file of earlier messages.

`tests/commands/test_chat.py` has it on a terminal.
"""

import os
import signal
import stat
import threading
import time

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from terminal_case import CTRL_C, UP

from jaxlm.chat.prompt import DraftDropped, history_file, line_editor


def test_ctrl_c_tells_a_draft_from_an_empty_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with (
        create_pipe_input() as keys,
        create_app_session(input=keys, output=DummyOutput()),
    ):
        read = line_editor()

        def after(sent):
            keys.send_text(sent)
            with pytest.raises(KeyboardInterrupt) as stop:
                read()
            return stop.type

        assert after(CTRL_C) is KeyboardInterrupt
        assert after(f"x{CTRL_C}") is DraftDropped
        assert after(f"x\x7f{CTRL_C}") is DraftDropped
        assert after(CTRL_C) is KeyboardInterrupt
        keys.send_text("Hi\r")
        assert read() == "Hi"
        assert after(f"{UP}{CTRL_C}") is DraftDropped
        assert after(CTRL_C) is KeyboardInterrupt


def test_sigterm_ends_the_editor_in_order(monkeypatch, tmp_path):
    """Otherwise the terminal would stay without an echo."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with (
        create_pipe_input() as keys,
        create_app_session(input=keys, output=DummyOutput()),
    ):
        read = line_editor()
        keys.send_text("\x18")  # C-x: the editor runs, and waits for the next key.
        threading.Thread(target=_signal_when_handled).start()
        with pytest.raises(SystemExit, match="143"):
            read()
    assert signal.getsignal(signal.SIGTERM) is before


def _signal_when_handled():
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_history_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / "jaxlm" / "chat_history"
    file.parent.mkdir()
    file.touch(0o644)
    assert history_file() == file
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_there_is_none_where_it_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "jaxlm").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() is None
