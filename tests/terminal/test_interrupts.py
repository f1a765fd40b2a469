"""Ctrl-C while the main thread sits in compiled code, and while it does not."""

import gc
import os
import signal
import sys
import time

from terminal_case import CTRL_C, Terminal

import jaxlm.terminal.interrupts
from jaxlm.terminal.interrupts import Interrupts

# Stands for XLA: compiled code that holds no lock of Python and runs for a minute.
PROGRAM = r"""
import hashlib, signal, sys, time
from jaxlm.terminal import interrupts, progress

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
raises = sys.argv[1] == "raises"
line = progress.ProgressLine(10)
line.update({"step": 1, "loss": 2.0})
with interrupts.Interrupts(CODES, "NOTICE", raises=raises) as stop:
    if raises:
        try:
            line.note("sleeping")
            time.sleep(60)
        except KeyboardInterrupt:
            line.note("raised")
    progress.WAIT_SECONDS = 0
    waiting = progress.Waiting("compiling")
    hashlib.pbkdf2_hmac("sha256", b"", b"", ROUNDS)
    waiting.finish()
    line.note(f"received {stop.received}")
line.close()
sys.exit(CODES[stop.received])
"""


def program(mode, rounds=10**9):
    source = PROGRAM.replace("ROUNDS", str(rounds))
    return Terminal([sys.executable, "-c", source, mode])


def seconds_until(terminal, pattern):
    began = time.monotonic()
    terminal.wait_for(pattern)
    return time.monotonic() - began


def test_the_first_signal_is_acknowledged_and_the_second_ends_the_process():
    with program("keeps") as terminal:
        terminal.wait_for(r"compiling \.\.\. [1-9]")
        terminal.send(CTRL_C)
        assert seconds_until(terminal, "(?m)^NOTICE$") < 0.5
        terminal.wait_for(r"compiling \.\.\. [2-9]")  # It goes on.
        terminal.send(CTRL_C)
        began = time.monotonic()
        assert terminal.wait() == 130
        assert time.monotonic() - began < 1
        assert not terminal.cursor_is_hidden


def test_one_signal_is_kept_for_the_program():
    with program("keeps", rounds=5_000_000) as terminal:
        terminal.wait_for(r"compiling \.\.\. \d")
        terminal.send(CTRL_C)
        assert terminal.wait() == 130
        lines = terminal.lines()
        assert lines.index("NOTICE") < lines.index("received 2")


def test_a_program_that_runs_python_is_interrupted_without_a_word():
    with program("raises") as terminal:
        terminal.wait_for("sleeping")
        terminal.send(CTRL_C)
        terminal.wait_for(r"compiling \.\.\. [1-9]")
        assert "raised" in terminal.lines() and "NOTICE" not in terminal.lines()
        # That one has had its effect, so the next is again a first one.
        terminal.send(CTRL_C)
        assert seconds_until(terminal, "(?m)^NOTICE$") < 0.5
        terminal.send(CTRL_C)
        assert terminal.wait() == 130


def test_under_nohup_sighup_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts = jaxlm.terminal.interrupts.Interrupts
    try:
        with interrupts({signal.SIGHUP: 75, signal.SIGTERM: 75}, raises=False) as seen:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert seen.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_signal_that_python_drops_is_acknowledged_without_a_traceback(capsys):
    """As in JAX's callback of the garbage collector."""

    def callback(phase, info):
        if phase == "start" and interrupts.received is None:
            signal.raise_signal(signal.SIGINT)

    hook = sys.unraisablehook
    with Interrupts({signal.SIGINT: 130}) as interrupts:
        gc.callbacks.append(callback)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(callback)
        assert interrupts.received == signal.SIGINT
    assert sys.unraisablehook is hook
    error = capsys.readouterr().err
    assert "Ctrl-C again ends at once" in error and "Traceback" not in error
