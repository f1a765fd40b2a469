"""Files that replace others."""

import errno
import os
import secrets
import stat
import subprocess
import sys

import pytest

from jaxlm.files.durable import new_folder, remove_abandoned, replacing


def test_a_link_in_place_of_the_new_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    target, page = tmp_path / "notes", tmp_path / "page.html"
    target.write_text("mine")
    with replacing(page) as file:
        (name,) = (f.name for f in tmp_path.iterdir() if f != target)
    page.unlink()
    (tmp_path / name).symlink_to(target)
    with pytest.raises(OSError, match="cannot write"), replacing(page) as file:
        file.write(b"a page")
    assert target.read_text() == "mine" and not page.exists()


def test_a_link_to_a_folder_is_not_replaced(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path)
    with pytest.raises(OSError, match="Is a directory"), replacing(link):
        pass
    assert link.is_symlink()


def test_two_writers_of_one_file_have_files_of_their_own(tmp_path):
    """Processes of two containers can have the same number."""
    page = tmp_path / "page.html"
    with replacing(page) as first:
        first.write(b"first")
        with replacing(page) as second:
            second.write(b"second")
        assert page.read_bytes() == b"second"
    assert page.read_bytes() == b"first" and list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("when", ["before", "while it is written"])
def test_only_what_began_so_is_replaced(tmp_path, when):
    """Somebody may have put a file there while a page took hours to make."""
    page = tmp_path / "page.html"
    for text in ("", "a page of before"):
        page.write_text(text)
        with replacing(page, b"a page") as file:
            file.write(b"a page of now")
    assert page.read_bytes() == b"a page of now"
    for earlier in (b"a page", None):
        page.unlink()
        if when == "before":
            page.write_text("mine")
        with (
            pytest.raises(OSError, match=f"stays.*'{page}'"),
            replacing(page, earlier) as file,
        ):
            file.write(b"a page of now")
            page.write_text("mine")
        assert page.read_text() == "mine" and list(tmp_path.iterdir()) == [page]


def test_who_may_read_a_file_may_read_the_one_that_replaces_it(tmp_path):
    """A conversation of mode 0600 became readable by all with the second /save."""
    talk = tmp_path / "talk.json"
    for mode, then in ((0o600, 0o600), (0o664, 0o664), (0o440, 0o640)):
        talk.touch()
        talk.chmod(mode)
        with replacing(talk) as file:
            file.write(b"more")
        assert stat.S_IMODE(talk.stat().st_mode) == then


def test_a_folder_gets_its_name_when_all_of_it_is_there(tmp_path):
    model = tmp_path / "models" / "m"
    with pytest.raises(OSError) as failed, new_folder(model) as folder:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x"))
    assert failed.value.filename == str(model / "x")
    assert list(model.parent.iterdir()) == []
    with new_folder(model) as folder:
        (folder / "x").touch()
        assert not model.exists()
    assert [f.name for f in model.parent.iterdir()] == ["m"]
    # What has come by this name meanwhile is not replaced.
    taken = pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY))
    with taken, new_folder(model):
        pass
    assert [f.name for f in model.iterdir()] == ["x"]


KILLED = """
import os, sys
from pathlib import Path
from jaxlm.files.durable import new_folder, replacing
with new_folder(Path(sys.argv[1])) as folder, replacing(folder / "x") as file:
    file.write(b"weights")
    with replacing(Path(sys.argv[1])):
        os._exit(9)
"""


def test_what_a_killed_process_leaves_is_removed_but_not_what_is_written(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    for path in (model, other):
        command = [sys.executable, "-c", KILLED, str(path)]
        assert subprocess.run(command).returncode == 9
    left = set(tmp_path.iterdir())
    assert len(left) == 4
    remove_abandoned(model)
    assert set(tmp_path.iterdir()) == left  # They may not be locked yet.
    for path in left:
        os.utime(path, (1, 1))
    with new_folder(model) as folder, replacing(tmp_path / "file") as file:
        for written in (folder, tmp_path / file.name):
            os.utime(written, (1, 1))
        for path in (model, tmp_path / "file"):
            remove_abandoned(path)
        assert folder.is_dir() and os.path.exists(file.name)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 4 and {"model", "file"} < names
    remove_abandoned(other)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "file"}
