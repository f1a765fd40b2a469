"""Files of a folder that somebody else has made, which may be links."""

import re
from pathlib import Path


def path_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder; checks that no link leads out of it.

    Links of the hub cache are `MODEL/snapshots/REVISION/name -> ../../blobs/HASH`.

    Raises:
      ValueError: for a link that leads out of the folder, or to nothing.
    """
    path = folder / name
    if not path.is_symlink():
        return path
    home = folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a circle is RuntimeError in Python 3.11, 3.12
        raise ValueError(f"{path}: a symbolic link to nothing") from None
    if target.is_relative_to(home):
        return path
    is_blob = (
        home.parent.name == "snapshots"
        and target.parent == home.parent.parent / "blobs"
        and re.fullmatch(r"[0-9a-f]+", target.name)
    )
    if not is_blob:
        raise ValueError(f"{path}: a symbolic link that leads out of the folder")
    return path
