"""Runs a small program in a process of its own, for work that a file may make endless.

The program limits its own CPU time and memory; the process is stopped when it takes too
long.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Wall-clock limit of a job. It also stops a program that sleeps, and leaves a busy
# machine time to start the process.
MAX_SECONDS = 20


class LimitedProgram:
    """A program that does one job after the other, in the same process.

    The process starts with the first job; after an error the next job has a new one.
    Threads may share it.
    """

    def __init__(
        self,
        program: str,
        packages: Sequence[ModuleType],
        what: str,
        *,
        cpu_seconds: int,
        most: int,
    ):
        """Prepares the process.

        Args:
          program: path of a Python file. It is run in isolated mode, in which it can
            only import the standard library and what is in the folders of its
            arguments. It reads jobs from stdin, as lines of JSON, and writes a line
            with an object for each.
          packages: packages whose folders these are.
          what: for messages: "the chat template".
          cpu_seconds: the limit that the program sets itself for each job.
          most: largest number of bytes of an answer.
        """
        folders = {str(Path(p.__path__[0]).parent) for p in packages}
        self._command = [sys.executable, "-I", program, *sorted(folders)]
        self._what, self._cpu_seconds, self._most = what, cpu_seconds, most
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def run(self, job: Any, *, is_last: bool = False) -> Mapping[str, Any]:
        """Sends a job, as JSON, and returns the object that is answered.

        With `is_last`, the program finds the end of stdin after it.

        Raises:
          ValueError: if it answers {"error": ...}, exceeds a limit, or ends without an
            answer.
        """
        data = json.dumps(job).encode() + b"\n"
        with self._lock:
            is_right = False
            try:
                answer = self._answer(data, is_last)
                is_right = True
                return answer
            finally:
                if is_last or not is_right:
                    self._end()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _answer(self, data: bytes, is_last: bool) -> Mapping[str, Any]:
        if self._child is None:
            self._child = subprocess.Popen(
                self._command,
                # Of its own: Ctrl-C is not for it.
                process_group=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        child, is_late = self._child, threading.Event()
        assert child.stdin is not None and child.stdout is not None

        def stop():
            is_late.set()
            child.kill()

        timer = threading.Timer(MAX_SECONDS, stop)
        timer.start()
        try:
            # One that has ended does not read.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(data)
                child.stdin.flush()
                if is_last:
                    child.stdin.close()
            line = child.stdout.readline(self._most)
            answer = self._parsed(line)
            if answer is None:
                # It may still be writing what nobody wants.
                child.stdout.close()
                child.wait()
        finally:
            timer.cancel()
            timer.join()
        if is_late.is_set():
            raise ValueError(f"{self._what} did not finish within {MAX_SECONDS} s")
        if answer is None:
            raise ValueError(self._ending(child))
        if "error" in answer:
            raise ValueError(f"{self._what} {answer['error']}")
        return answer

    @staticmethod
    def _parsed(line: bytes) -> Mapping[str, Any] | None:
        try:
            return json.loads(line)
        except ValueError:
            return None

    def _ending(self, child: subprocess.Popen[bytes]) -> str:
        if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            seconds = self._cpu_seconds
            return f"{self._what} ran for more than {seconds} s and was stopped"
        assert child.stderr is not None
        lines = child.stderr.read().decode(errors="replace").strip().splitlines()
        return (
            f"the process of {self._what} ended with status {child.returncode}: "
            f"{lines[-1] if lines else 'no message'}"
        )

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            assert pipe is not None
            # What it has not read is lost.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._child = None


def run_limited(
    program: str,
    packages: Sequence[ModuleType],
    job: Any,
    what: str,
    *,
    cpu_seconds: int,
    most: int,
) -> Mapping[str, Any]:
    """Runs a `LimitedProgram` for one job.

    Raises:
      ValueError: as `LimitedProgram.run`.
    """
    limits = {"cpu_seconds": cpu_seconds, "most": most}
    return LimitedProgram(program, packages, what, **limits).run(job, is_last=True)
