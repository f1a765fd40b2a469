"""Runs a small program in a process of its own, for work that a file may make endless.

The program limits its own CPU time and memory; the process is stopped when it takes too
long.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

# Wall-clock limit. It also stops a program that sleeps, and leaves a busy machine time
# to start the process.
MAX_SECONDS = 20


def run_limited(
    program: str,
    packages: list[ModuleType],
    job: Any,
    what: str,
    *,
    cpu_seconds: int,
    most: int,
) -> Mapping[str, Any]:
    """Runs a program with a job on stdin, and returns the object that it writes.

    Args:
      program: path of a Python file. It is run in isolated mode, in which it can only
        import the standard library and what is in the folders of its arguments.
      packages: packages whose folders these are.
      job: what the program reads, as JSON.
      what: for messages: "the chat template".
      cpu_seconds: the limit that the program sets itself.
      most: largest number of bytes of the answer.

    Raises:
      ValueError: if it answers {"error": ...}, exceeds a limit, or ends without an
        answer.
    """
    folders = {str(Path(p.__path__[0]).parent) for p in packages}
    command = [sys.executable, "-I", program, *sorted(folders)]
    try:
        child = subprocess.run(
            command,
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{what} did not finish within {MAX_SECONDS} s") from None
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ValueError(f"{what} ran for more than {cpu_seconds} s and was stopped")
    try:
        answer = json.loads(child.stdout[:most])
    except ValueError:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"the process of {what} ended with status {child.returncode}: "
            f"{lines[-1] if lines else 'no message'}"
        ) from None
    if "error" in answer:
        raise ValueError(f"{what} {answer['error']}")
    return answer
