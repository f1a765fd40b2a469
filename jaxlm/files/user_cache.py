"""The folder of what jaxlm keeps for a user: each part of it can be made again."""

import errno
import os
from pathlib import Path


def user_cache() -> Path:
    """Returns jaxlm's folder in the user's cache folder; it may not exist.

    Raises:
      OSError: if the user has no home folder, as with `docker run --user`.
    """
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(root).expanduser() / "jaxlm"
    except RuntimeError:
        raise OSError(errno.ENOENT, "the user has no home folder", root) from None
