"""Ctrl-C while the main thread sits in compiled code, and while it does not."""

import gc
import select
import signal
import sys
import time
from types import SimpleNamespace

from terminal_case import CTRL_C, Terminal

import jaxlm.terminal.interrupts
from jaxlm.terminal.interrupts import Interrupts
from jaxlm.train.stopping import SIGNAL_CODES

# Stands for XLA: compiled code that holds no lock of Python, and runs for minutes if
# there are many rounds.
PROGRAM = r"""
import hashlib, signal, sys, threading, time, types
from jaxlm.terminal import interrupts, progress

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
raises = sys.argv[1] == "raises"
line = progress.ProgressLine(10)
line.update({"step": 1, "loss": 2.0})
# However busy the machine is, the main thread has time to answer the first signal.
raised = threading.Event()
interrupts.time = types.SimpleNamespace(
    monotonic=time.monotonic, sleep=lambda seconds: raised.wait()
)

def seconds():
    clock = time.pthread_getcpuclockid(threading.main_thread().ident)
    return time.clock_gettime(clock)

def tell(since):
    # Only compiled code takes so much of a processor.
    while seconds() < since + 0.1:
        time.sleep(0.01)
    line.note("computes")

with interrupts.Interrupts(CODES, "NOTICE", raises=raises) as stop:
    if raises:
        try:
            line.note("sleeping")
            # One long sleep would not hear a signal just before it.
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            line.note("raised")
        raised.set()
    progress.WAIT_SECONDS = 0
    waiting = progress.Waiting("compiling")
    threading.Thread(target=tell, args=(seconds(),), daemon=True).start()
    while raises or not stop.received:
        hashlib.pbkdf2_hmac("sha256", b"", b"", ROUNDS)
    waiting.finish()
    line.note(f"received {stop.received}")
line.close()
sys.exit(CODES[stop.received])
"""


def program(mode, rounds=10**9):
    source = PROGRAM.replace("ROUNDS", str(rounds))
    return Terminal([sys.executable, "-c", source, mode])


def test_the_first_signal_is_acknowledged_and_the_second_ends_the_process():
    with program("keeps") as terminal:
        terminal.wait_for("(?m)^computes$")
        seconds = terminal.wait_for(r"compiling \.\.\. (\d+)")[1]
        terminal.send(CTRL_C)
        terminal.wait_for("(?m)^NOTICE$")
        terminal.wait_for(rf"compiling \.\.\. (?!{seconds} )\d")  # It goes on.
        time.sleep(0.2)  # One that comes at once is the same.
        terminal.send(CTRL_C)
        assert terminal.wait() == 130
        assert not terminal.cursor_is_hidden


def test_one_signal_is_kept_for_the_program():
    with program("keeps", rounds=100_000) as terminal:
        terminal.wait_for(r"compiling \.\.\. \d")
        terminal.send(CTRL_C)
        assert terminal.wait() == 130
        # The notice may come before it, after it or not at all: the program may answer
        # before the thread that writes it.
        assert "received 2" in terminal.lines()


def test_a_program_that_runs_python_is_interrupted_without_a_word():
    with program("raises") as terminal:
        terminal.wait_for("sleeping")
        terminal.send(CTRL_C)
        terminal.wait_for("(?m)^computes$")
        assert "raised" in terminal.lines() and "NOTICE" not in terminal.lines()
        # That one has had its effect, so the next is again a first one.
        terminal.send(CTRL_C)
        terminal.wait_for("(?m)^NOTICE$")
        time.sleep(0.2)
        terminal.send(CTRL_C)
        assert terminal.wait() == 130


def test_under_nohup_sighup_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts = jaxlm.terminal.interrupts.Interrupts
    try:
        with interrupts({signal.SIGHUP: 75, signal.SIGTERM: 75}, raises=False) as seen:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert seen.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_repeated_signal_is_one_request(monkeypatch):
    """A closed terminal and its shell, `timeout`, the limit of CPU time."""
    ended, module, now = [], jaxlm.terminal.interrupts, 0.0
    monkeypatch.setattr(module, "_end", ended.append)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    with Interrupts({**SIGNAL_CODES}, raises=False) as seen:

        def send(*numbers):
            for number in numbers:
                signal.raise_signal(number)
                while not is_answered():
                    time.sleep(0.001)
            return ended

        def is_answered():
            with seen._lock:  # The thread takes and answers a signal inside.
                return not select.select([seen._heard], [], [], 0)[0]

        assert not send(signal.SIGUSR1, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)
        assert not send(signal.SIGINT)  # also from `timeout -s INT`
        now = 0.2
        assert send(signal.SIGINT) == [130]
        assert send(signal.SIGHUP) == [130]
        now = 3.0
        # The limit of CPU time; Slurm's announcement, and then its limit of time.
        assert send(signal.SIGXCPU, signal.SIGTERM, signal.SIGUSR2) == [130]
        assert send(signal.SIGUSR1) == [130, 75]
        assert seen.received == signal.SIGUSR1


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
