"""The file of earlier messages. The line editor is tested on a terminal."""

import stat

from jaxlm.chat.prompt import history_file


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
