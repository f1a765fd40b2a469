"""Progress of long work on terminals and in logs."""

import io
import math
import os
import re
import subprocess
import sys

import pytest
from terminal_case import Terminal

from jaxlm.terminal.progress import (
    ProgressLine,
    format_count,
    format_row,
    format_seconds,
)

# A run whose bars, notes, warnings and output all reach the terminal at the same time.
RUN = r"""
import sys, warnings
from jaxlm.terminal import progress

progress.DELAY_SECONDS = -1.0  # Bars appear at once.
progress.WAIT_SECONDS = 0.0
line = progress.ProgressLine(2000)
line.note("run: 12 parameters [bold]")
row = {"loss": 2.0, "lr": 1e-3, "tokens_per_s": 1000.0, "data_wait_s": 0.0, "step_s": 0.1}
for step in range(1, 1001):
    line.update({"step": step, **row})
    if step == 500:
        print("on stdout")
        print("on stderr", file=sys.stderr)
        warnings.warn_explicit("a warning", UserWarning, "file.py", 7)
        line.note("a sample\n\x1b[2J\rTo be\nor not " + "x" * 80)
        with progress.progress_bar("hashing [a/b]", 1000) as advance_to:
            advance_to(10)
            with progress.Waiting("learning [a]") as waiting:
                waiting._timer.join()  # It is shown, however busy the machine is.
                if waiting._live:
                    waiting._live.refresh()
                line.note("a note under three lines")
            advance_to(1000)
line.update({"step": 2000, **row, "loss": 1.0})
line.close()
print("the end")
"""
ROW = {
    "loss": 2.3141,
    "lr": 1.9e-2,
    "tokens_per_s": 41234.0,
    "mfu": 0.312,
    "data_wait_s": 0.0001,
    "step_s": 0.1,
}
FIGURES = "lr 1.0e-03 1.0k tok/s wait 0% 0:00 left"


def on_terminal(program: str, *, columns: int = 80, **environment: str):
    """Returns the lines on the terminal of a program, and all bytes that it wrote."""
    command = [sys.executable, "-c", program]
    with Terminal(command, columns=columns, environment=environment) as terminal:
        assert terminal.wait() == 0, terminal.lines()
        assert not terminal.cursor_is_hidden
        return terminal.lines(), terminal.written


@pytest.mark.parametrize("columns", [100, 50])
def test_lines_on_a_terminal_do_not_overwrite_each_other(columns):
    lines, written = on_terminal(RUN, columns=columns)
    long = "or not " + "x" * 80
    assert lines[:3] == ["run: 12 parameters [bold]", "on stdout", "on stderr"]
    assert lines[3:6] == ["file.py:7: UserWarning: a warning", "a sample", "�[2J�To be"]
    rest = lines[6:]
    wrapped = rest[: -(-len(long) // columns)]
    assert "".join(wrapped) == long
    rest = rest[len(wrapped) :]
    assert rest[0] == "a note under three lines"
    assert rest[1].startswith("hashing [a/b] ━━━━━")
    assert re.search(rb"learning \[a\] ... \d s", written)  # Gone when it is over.
    assert lines[-1] == "the end"
    if columns == 100:
        assert lines[-2] == f"step 2000/2000 {'━' * 20} loss 1.000 {FIGURES}"
        assert len(rest) == 4
    else:  # A shorter bar, and only the figures that there is room for.
        figures = "loss 1.000 1.0k tok/s 0:00 left"
        assert re.fullmatch(f"step 2000/2000 ━* ?{figures}", lines[-2])


def test_a_terminal_without_cursor_movements_gets_plain_lines():
    lines, written = on_terminal(RUN, TERM="dumb")
    assert b"\x1b" not in written
    assert f"step 2000/2000 [{'#' * 20}] loss 1.000 {FIGURES}"[:80] in lines


def test_no_color_is_respected():
    _, colours = on_terminal(RUN)
    _, written = on_terminal(RUN, NO_COLOR="1")
    assert b"\x1b[38;5" in colours and b"\x1b[38;5" not in written


def test_a_pipe_gets_plain_lines_whatever_the_environment_says():
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**os.environ, "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "on stdout\nthe end\n"
    assert "\x1b" not in result.stderr and "\r" not in result.stderr
    lines = result.stderr.splitlines()
    assert lines[0] == "run: 12 parameters [bold]"
    assert lines[1].startswith(f"step    1/2000 [{'-' * 20}] loss 2.000 lr 1.0e-03")
    assert lines[-1].startswith(f"step 2000/2000 [{'#' * 20}] loss 1.000 lr 1.0e-03")
    assert any(line.startswith("hashing [a/b]") for line in lines)
    assert "learning [a] ..." in lines
    assert any(re.fullmatch(r"learning \[a\] ... \d\.\d s", line) for line in lines)


def test_the_figures_of_a_row():
    figures = "loss 2.314 lr 1.9e-02 41.2k tok/s MFU 31% wait 0% 3:12 left"
    assert format_row(ROW, 192.0) == figures
    odd = {"loss": math.nan, "tokens_per_s": math.inf, "mfu": None, "lr": None}
    assert format_row(odd, math.nan) == "loss nan - tok/s - left"
    assert format_row({"loss": 1e30, "mfu": 0.001}) == "loss 1.00e+30 MFU 0.1%"


def test_without_room_for_all_figures_the_less_important_are_left_out():
    whole = format_row(ROW, 192.0)
    lines = [format_row(ROW, 192.0, width) for width in range(len(whole), -1, -1)]
    assert list(dict.fromkeys(lines)) == [
        whole,
        "loss 2.314 lr 1.9e-02 41.2k tok/s MFU 31% 3:12 left",
        "loss 2.314 lr 1.9e-02 41.2k tok/s 3:12 left",
        "loss 2.314 41.2k tok/s 3:12 left",
        "loss 2.314 3:12 left",
        "loss 2.314",
        "",
    ]
    assert all(len(line) <= len(whole) - i for i, line in enumerate(lines))


def test_counts_and_times_in_words():
    counts = [950, 999.9, 41_234, 99_960, 1_000_000, 10.77e6, 1.3e9]
    assert [format_count(v) for v in counts] == [
        *("950", "1.0k", "41.2k", "100k", "1.0M", "10.8M", "1.3B")
    ]
    spans = [0, 7.4, 192, 3723, 97_200]
    assert [format_seconds(v) for v in spans] == [
        *("0:00", "0:07", "3:12", "1:02:03", "1d 03h")
    ]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_gets_a_line_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(100, stream=stream, clock=clock)
    for step in range(1, 96):
        progress.update({"step": step, **ROW})
        clock.now += 0.5
    progress.close()
    lines = stream.getvalue().splitlines()
    shown = [int(line.split()[1].split("/")[0]) for line in lines]
    assert shown == [1, 21, 41, 61, 81, 95]  # The first, one every 10 s, the last.
    # 0.5 s a step by the clock, which includes evaluations, not by the rows.
    assert lines[2].endswith("0:30 left")


# The main thread sits in compiled code, as it does while XLA compiles; the second time
# until a file is there, or for so many seconds.
WAITS = """
import hashlib, pathlib, sys, time
from jaxlm.terminal import progress

def compute(is_over):
    while not is_over():
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)

def ends_after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end

progress.WAIT_SECONDS = 1000
with progress.Waiting("too short to be shown"):
    compute(ends_after(0.1))
progress.WAIT_SECONDS = 0.3
waiting = progress.Waiting("compiling [it]")
until = sys.argv[1]
compute(pathlib.Path(until).exists if until.startswith("/") else ends_after(float(until)))
waiting._timer.join()  # It is shown, however busy the machine is.
waiting.finish()
waiting.finish()
print("first tokens")
"""


def test_a_wait_counts_its_seconds_by_itself_and_is_gone_when_it_is_over(tmp_path):
    end = tmp_path / "end"
    with Terminal([sys.executable, "-c", WAITS, end]) as terminal:
        line = r"\Acompiling \[it\] \.\.\. "
        seconds = terminal.wait_for(rf"{line}(\d+) s\Z")[1]
        terminal.wait_for(rf"{line}(?!{seconds} )\d+ s\Z")
        assert not terminal.cursor_is_hidden
        end.touch()
        assert terminal.wait() == 0
        assert terminal.lines() == ["first tokens"]


def test_a_log_gets_one_line_when_a_wait_is_long_and_one_with_its_seconds():
    result = subprocess.run(
        [sys.executable, "-c", WAITS, "1"], capture_output=True, text=True, check=True
    )
    assert result.stdout == "first tokens\n"
    first, last = result.stderr.splitlines()
    assert first == "compiling [it] ..."
    assert re.fullmatch(r"compiling \[it\] \.\.\. [1-9]\d*\.\d s", last)
