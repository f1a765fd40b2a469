"""Files that replace others."""

import secrets

import pytest

from jaxlm.files.durable import replacing


def test_a_link_in_place_of_the_new_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    target, page = tmp_path / "notes", tmp_path / "page.html"
    target.write_text("mine")
    (tmp_path / ".tmp-guessed").symlink_to(target)
    with pytest.raises(OSError, match="cannot write"), replacing(page) as file:
        file.write(b"a page")
    assert target.read_text() == "mine" and not page.exists()


def test_two_writers_of_one_file_have_files_of_their_own(tmp_path):
    """Processes of two containers can have the same number."""
    page = tmp_path / "page.html"
    with replacing(page) as first:
        first.write(b"first")
        with replacing(page) as second:
            second.write(b"second")
        assert page.read_bytes() == b"second"
    assert page.read_bytes() == b"first" and list(tmp_path.iterdir()) == [page]
