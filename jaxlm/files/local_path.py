"""Paths that a person has named, of files and folders of this machine."""

import re
from pathlib import Path


def local_path(name: str | Path, what: str) -> Path:
    """Returns the path of a name.

    Args:
      name: the name; of a URL, a path has lost one of two slashes.
      what: what it names, for the message.

    Raises:
      ValueError: for what would be a file or a folder of an odd name: a URL, and `~`,
        which shells do not expand within quotes or after an equals sign.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(name)):
        raise ValueError(
            f"{what} {name} is a URL, and it must be a path of this machine: mount "
            "what it names, and give a path there"
        )
    if str(name).startswith("~"):
        raise ValueError(
            f"{what} {name} begins with ~, which the shell has not expanded: write it "
            "without quotes and after a space instead of =, or the whole path"
        )
    return Path(name)
