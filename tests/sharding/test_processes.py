"""How processes agree: several in the threads of one, with the real coordinator."""

import multiprocessing.connection
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from random import Random

import processes_case
import pytest
from forked_case import Forked
from jaxlib import _jax

from jaxlm.config import ProcessesConfig
from jaxlm.sharding.processes import (
    ALONE,
    PlaceLost,
    Processes,
    ProcessFailed,
    ProcessMissing,
)
from jaxlm.terminal.exit_codes import EXIT_PROCESS_LOST

COUNT = 3


@pytest.fixture(scope="module")
def three():
    port = free_port()
    service = _jax.get_distributed_runtime_service(
        f"[::]:{port}", COUNT, recoverable=True
    )
    made = [connected_to(port, index) for index in range(COUNT)]
    in_each(made, lambda processes: processes._client.connect())
    in_each(made, lambda processes: processes._take_place("x:1"))
    yield made
    in_each(made, lambda processes: processes._client.shutdown())
    service.shutdown()


def connected_to(port, index):
    processes = Processes(None, ProcessesConfig(barrier_minutes=0.1))
    processes.index, processes.count = index, COUNT
    processes.port = port
    processes._client = processes._client_at(f"localhost:{port}")
    return processes


def in_each(processes, work):
    """What `work` returns in each, or the exception that it raises."""

    def attempt(one):
        try:
            return work(one)
        except Exception as error:
            return error

    with ThreadPoolExecutor(COUNT) as pool:
        return list(pool.map(attempt, processes))


def test_values_of_all_and_of_the_first(three):
    for turn in range(3):  # The same name again.
        found = in_each(three, lambda p, turn=turn: p.gather("numbers", p.index + turn))
        assert found == [[turn, turn + 1, turn + 2]] * 3
    calls = []
    found = in_each(three, lambda p: p.of_first("step", lambda: calls.append(1) or 7))
    assert found == [7, 7, 7]
    assert calls == [1]


def test_a_failure_is_every_ones(three):
    def work(processes):
        if processes.index == 1:
            raise OSError(28, "No space left on device", "x")
        return processes.index

    found = in_each(three, lambda p: p.together("write", lambda: work(p)))
    assert isinstance(found[1], OSError)
    for other in (found[0], found[2]):
        assert isinstance(other, ProcessFailed)
        assert "process 1: " in str(other)
        assert "No space left" in str(other)
        assert other.exit_code == 2


def test_who_is_missing_is_named(three):
    for processes in three:
        processes._limit_s = 3.0
    found = in_each(three[::2], lambda p: p.gather("late"))
    for error in found:
        assert isinstance(error, ProcessMissing)
        assert str(error).startswith("late: process 1 of 3 did not come within ")
    three[1]._uses["late"] += 1
    for processes in three:
        processes._limit_s = 600.0
    assert in_each(three, lambda p: p.gather("late", 1)) == [[1, 1, 1]] * 3


@pytest.mark.parametrize("index", range(COUNT))
def test_who_joins_a_run_is_refused_and_the_run_goes_on(three, index):
    """Whether the one whose index it has waits for others, or they for that one."""
    joins, joined = connected_to(three[0].port, index), threading.Event()

    class Leaving:
        def wait(self, seconds):
            three[index]._show(1)

    def wait(processes):
        if processes.index == 2:
            joined.wait()
        return processes.gather(name, processes.index)

    name = f"beside one that joins as {index}"
    joins._leaving = Leaving()
    three[index]._show(0)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(in_each, three, wait)
        while len(three[0]._read(f"jaxlm/{name}/0/")) < 2:
            time.sleep(0.01)
        joins._client.connect()
        with pytest.raises(ValueError, match=f"has a process {index}, on .*: give "):
            joins._take_place("x:1")
        joins._heartbeat_s = 0.0
        with pytest.raises(PlaceLost, match=f"process {index} of the run at x:1 is go"):
            joins._take_place("x:1")
        joined.set()
        assert found.result() == [[0, 1, 2]] * 3
    joins._client.shutdown()


@pytest.mark.parametrize("asks", [0, 2])
def test_all_agree_at_the_same_point_wherever_they_are(three, asks):
    """One is far ahead of the others, and one far behind, when it becomes known."""
    heard, noticed = threading.Event(), threading.Barrier(COUNT)
    starts = (5, 9, 2)

    def run(processes):
        agreement = processes.agreement(f"stop {asks}")
        for _ in range(starts[processes.index]):
            assert agreement.reached(None) is None
        noticed.wait()
        wanted = [75, True] if processes.index == asks else None
        point = starts[processes.index]
        if wanted is not None:
            point += 1
            assert agreement.reached(wanted) is None
            heard.set()
        heard.wait()
        processes._look({})
        while agreement.reached(None) is None:
            point += 1
        assert agreement.reached(None) == [75, True]
        return point

    assert in_each(three, run) == [9 + (starts[asks] == 9)] * 3


def test_one_that_lives_but_does_not_go_on_ends_all(three, monkeypatch):
    """After the limit of a barrier, or ten times what any point has taken before."""
    first, ended, now = three[0], [], 0.0
    end = "jaxlm/notices/end"

    def go_on(points, seconds, limit_s=2.0):
        nonlocal now
        now += seconds
        first._limit_s = limit_s
        for processes, processes._points in zip(three, points, strict=True):
            processes._show(int(now))
        first._look({})
        return ended

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(first, "_end", lambda *end, **grace: ended.append(end))
    assert go_on((0, 0, 0), 1) == go_on((0, 0, 0), 99) == []  # compiling
    assert go_on((1, 1, 2), 9) == go_on((2, 2, 3), 5) == []  # 5 s for a point
    assert go_on((3, 4, 5), 1) == go_on((6, 4, 7), 1) == []
    assert go_on((6, 4, 7), 49) == []
    assert go_on((6, 4, 7), 2, limit_s=60.0) == []
    line = "process 1 of 3 is gone: it lives, but hangs for 52 s"
    assert go_on((6, 4, 7), 1) == [(76, line)]
    notice = first._client.key_value_try_get(end)
    assert notice == '[1, 76, "it lives, but hangs for 52 s"]'
    first._client.key_value_delete(end)


def test_who_was_stopped_itself_gives_nobody_up(three, monkeypatch):
    """As in a virtual machine that is paused, or on one with too much to do."""
    first, ended, now, alive = three[0], [], 0.0, {}
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(first, "_end", lambda *end, **grace: ended.append(end))
    monkeypatch.setattr(first, "_check_points", lambda *_: None)
    monkeypatch.setattr(first, "_heartbeat_s", 60.0)
    monkeypatch.setattr(first, "_looked_s", 0.0)
    for processes in three:
        processes._show(1000)
    for seconds in (1, 100, 20, 20, 20):
        now += seconds
        first._look(alive)
        assert not ended
    first._show(1001)
    now += 1
    first._look(alive)
    lines = [line for _, line in ended]
    assert len(lines) == 2 and all(
        "nothing was heard of it for 61.0 s" in x for x in lines
    )
    first._client.key_value_delete("jaxlm/notices/end")


class Ended(Exception):
    """In place of the end of a process."""


def end(code, line, grace_s=3.0):
    assert code == EXIT_PROCESS_LOST and grace_s == 0
    raise Ended(line)


@pytest.mark.parametrize("lost", [0, 1])
def test_silence_ends_all_within_two_heartbeats(three, monkeypatch, lost):
    """Though they look as rarely as 4 times in a heartbeat, and not 8 times."""
    heartbeat_s, random = 60.0, Random(lost)
    now, beats, lines = 0.0, 0, []
    monkeypatch.setattr("time.monotonic", lambda: now)
    for processes in three:
        processes._show(-1)
        monkeypatch.setattr(processes, "_end", end)
        monkeypatch.setattr(processes, "_check_points", lambda *_: None)
        monkeypatch.setattr(processes, "_heartbeat_s", heartbeat_s)
        monkeypatch.setattr(processes, "_looked_s", now)
    looks = [(now, index, {}) for index in range(COUNT)]
    while len(lines) < COUNT - 1:
        now, index, alive = heappop(looks)
        if index == lost:
            if now > 3 * heartbeat_s:
                continue
            last_s = now
        beats += 1
        three[index]._show(beats)
        try:
            three[index]._look(alive)
        except Ended as ended:
            lines.append(str(ended))
            assert heartbeat_s < now - last_s <= 2 * heartbeat_s
        else:
            next_s = now + heartbeat_s * random.uniform(0.02, 0.25)
            heappush(looks, (next_s, index, alive))
    for line in lines:
        assert line.startswith(f"process {lost} of 3 ")
        [silent_s] = re.findall(r": nothing was heard of it for (.*) s", line)
        assert heartbeat_s <= float(silent_s) <= 1.5 * heartbeat_s
    three[0]._client.key_value_delete("jaxlm/notices/end")


def test_a_silent_coordinator_ends_all_within_two_heartbeats(three, monkeypatch):
    """However rarely they look; after half a heartbeat they were stopped themselves."""
    first, now, random = three[0], 0.0, Random(0)

    class Leaving:
        def wait(self, seconds):
            nonlocal now
            now += heartbeat_s * random.uniform(0.01, 0.5)

    heartbeat_s = 60.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(first, "_end", end)
    monkeypatch.setattr(first, "_heartbeat_s", heartbeat_s)
    monkeypatch.setattr(first, "_leaving", Leaving())
    for _ in range(20):
        now = first._heard_s = 0.0
        with pytest.raises(Ended, match="process 0 is gone: its coordinator has not"):
            first._watch()
        assert 1.5 * heartbeat_s < now <= 2 * heartbeat_s


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def started(folder, count, indices, *minutes, late=0):
    """Starts processes, as many as `late` when the others have all started."""
    port, children = free_port(), []
    for number, index in enumerate(indices):
        if number == len(indices) - late:
            for child in children:
                child.wait_for("coordinator ")
        child = Forked(
            *(processes_case.run, port, count, index, *minutes),
            output=folder / str(number),
            environment=os.environ,
            folder=folder,
        )
        children.append(child)
    return children


def kill(number, *pids):
    for pid in pids:
        os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", ["machine 0", "process 1"])
def test_one_that_is_gone_ends_the_others_with_a_line(tmp_path, number, lost):
    """JAX would abort them in C++ where the coordinator is gone too."""
    first, second = started(tmp_path, 2, (0, 1))
    for child in (first, second):
        child.wait_for("coordinator ")
    coordinator = int(first.out.split()[-1])
    if lost == "machine 0":
        left, gone = second, [coordinator, first.pid]
    else:
        left, gone = first, [second.pid]
    kill(number, *gone)
    code = left.wait(60)
    kill(signal.SIGKILL, *(gone if number == signal.SIGSTOP else ()))
    assert code == EXIT_PROCESS_LOST
    [line] = left.err.splitlines()
    assert line.startswith(f"error: process {lost[-1]} ")
    assert "is gone: " in line and line.endswith("continues from the last checkpoint")
    [silent_s] = re.findall(r" for (.*) s;", line)
    assert 1.0 <= float(silent_s) <= 2.0  # heartbeats of a second, by its own clock


@pytest.mark.slow
def test_one_that_never_starts_ends_the_others_with_a_line(tmp_path):
    [first] = started(tmp_path, 2, [0], 0.02)
    assert first.wait() == 1
    assert re.fullmatch(
        r"error: process 0 of 2 cannot reach .*, or not all have started within 0\.02 "
        r"minutes\n",
        first.err,
    )


@pytest.mark.slow
def test_two_with_one_index_end_with_a_line(tmp_path):
    """JAX aborted all. One of the two is refused; the others wait for who is missing."""
    children = _, *twins = started(tmp_path, 3, [0, 1, 1])
    multiprocessing.connection.wait([twin._process.sentinel for twin in twins], 60)
    ended = [twin for twin in twins if twin.code is not None]
    kill(signal.SIGKILL, *(child.pid for child in children if child not in ended))
    [refused] = ended
    assert refused.code == 1
    # JAX logs its own error, too.
    assert re.search(
        r"^error: process 1 of 3 is refused by .*: another process has "
        r"processes\.index 1 too, or process 0 another processes\.count$",
        refused.err,
        re.MULTILINE,
    )


@pytest.mark.slow
def test_who_joins_a_run_that_has_started_ends_with_a_line(tmp_path):
    """JAX aborted all. The run goes on, and ends as it would have."""
    *run, joins = started(tmp_path, 2, (0, 1, 1), late=1)
    code = joins.wait(60)
    kill(signal.SIGKILL, *(() if code is not None else (joins.pid,)))
    assert code == 1, [child.code for child in run]
    [line] = joins.err.splitlines()
    assert line.startswith("error: the run at localhost:")
    assert " has a process 1, on " in line
    (tmp_path / "end").touch()
    for child in run:
        assert child.wait() == 0 and not child.err


def test_alone_nothing_waits():
    assert ALONE.is_first
    assert ALONE.gather("x", 3) == [3]
    assert ALONE.together("x", lambda: 4) == 4
    assert ALONE.of_first("x", lambda: 5) == 5
    agreement = ALONE.agreement("x")
    assert [agreement.reached(v) for v in (None, 1, None)] == [None, 1, None]
