"""Why a checkpoint could not be saved."""

import errno
import os
import re
import shutil
from pathlib import Path

from jaxlm.sharding.processes import ProcessFailed
from jaxlm.terminal.exit_codes import EXIT_NOT_FINITE
from jaxlm.terminal.printable import error_line


class SaveError(ValueError):
    """A checkpoint could not be written; earlier ones are intact."""


class StateNotFinite(ValueError):
    """A state has NaN or infinities: the update of its step has overflowed."""

    exit_code = EXIT_NOT_FINITE

    def __init__(self, step: int, name: str):
        super().__init__(
            f"the state of step {step} is not finite ({name}), so it is not saved; in "
            "training, lower --optimizer.learning-rate"
        )


def save_failed(folder: Path, needed: int, error: Exception) -> str:
    """Returns the message of a SaveError, with the reason that the system gave.

    Args:
      folder: the step that could not be written.
      needed: the bytes of its arrays.
      error: what was raised.
    """
    text = " ".join(str(error).split())
    # TensorStore wraps the system error in a paragraph.
    found = re.search(r"os_error_code='(\d+)'", text)
    code = int(found[1]) if found else getattr(error, "errno", None)
    reason = error_line(error, 200)
    if code is not None:
        reason = os.strerror(code)
        if isinstance(error, ProcessFailed):
            reason = f"process {error.index}: {reason}"
    message = f"{folder} cannot be written ({reason})"
    if code == errno.ENOSPC:
        # Beside its arrays a step has files of metadata, in whole blocks.
        free = shutil.disk_usage(folder.parent).free
        if free > 2 * needed + (64 << 20):
            message += ": the disk has no room for more files (df -i)"
        else:
            message += f": a step needs more than the {free:,} bytes that are free"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message += f"; its arrays have {needed:,} bytes. Make room, or raise your quota"
    return f"{message}; earlier steps are intact"
