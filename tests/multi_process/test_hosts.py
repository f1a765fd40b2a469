"""Several real processes: stopped, killed, and resumed in another number."""

import dataclasses
import re
import runpy
import signal

import jax
import numpy as np
import pytest
from hosts_case import HEARTBEAT_S, STEPS, Hosts, make_text

from jaxlm import init, save, tree
from jaxlm.checkpoint.load import load
from jaxlm.terminal.exit_codes import EXIT_PREEMPTED, EXIT_PROCESS_LOST
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.train.metrics import read_metrics

pytestmark = pytest.mark.slow


def check_lost(ends, index, of):
    """All others end by themselves, with one line and their own exit code.

    By the clock of the one that gave it up, after at most two heartbeats.
    """
    for other, (code, text) in enumerate(ends):
        if other == index:
            continue
        assert code == EXIT_PROCESS_LOST, text
        lines = [line for line in text.splitlines() if "error" in line]
        assert len(lines) == 1, text
        assert lines[0].startswith(f"error: process {index} of {of}")
        [silent_s] = re.findall("nothing was heard of it for (.*) s;", lines[0])
        assert HEARTBEAT_S <= float(silent_s) <= 2 * HEARTBEAT_S
        assert "Traceback" not in text
        assert "Check failure" not in text


@pytest.mark.long
def test_a_run_is_stopped_killed_and_resumed_in_other_numbers_of_processes(tmp_path):
    text = make_text(tmp_path)
    folders = [tmp_path / "straight", tmp_path / "many"]
    for folder in folders:
        folder.mkdir()
    straight, many = (Hosts(folder, text) for folder in folders)
    # Both begin with the same weights, of which each process loads its own parts.
    model = runpy.run_path(str(many.config))["get_config"]().model
    model = dataclasses.replace(model, vocab_size=ByteTokenizer().vocab_size)
    params = init(model, jax.random.key(3))
    save(tmp_path / "initial", model, params, ByteTokenizer())
    initial = f"--init-from={tmp_path / 'initial'}"

    # A signal at one of two stops both, and both save the same step.
    # They also evaluate, sample and look inside together.
    rows = [f"--train.{kind}-every=4" for kind in ("sample", "look")]
    ends = many.start(
        *(2, 2, "SIGTERM@5"),
        of=1,
        flags=[*rows, initial],
        last_flags=["--profile.steps=2:4"],
    )
    assert [code for code, _ in ends] == [EXIT_PREEMPTED] * 2, ends
    before, stopped = many.steps()
    # That step and, where the other one was ahead, one more.
    assert 4 <= stopped <= 6
    meta = many.meta(stopped)
    assert meta["environment"]["process_count"] == 2
    assert meta["state_hash"] is None
    # Of each array the shards that one or the other has written.
    table = meta["shard_hashes"]["params/embed/table"]
    assert len(table) == 2, table
    for key in ("text", "induction_heads"):
        assert [row["step"] for row in read_metrics(many.path) if key in row] == [4]
    # Only process 0 writes what a person reads.
    assert f"saved at step {stopped}" in ends[0][1]
    assert "saved" not in ends[1][1]
    for index in (0, 1):
        assert ("writes the report" in ends[index][1]) == (index == 0)
    assert (many.path / "report.html").stat().st_size
    # A trace is of the processes that have the flag.
    [trace] = (many.path / "profile").rglob("*.xplane.pb")
    assert b"train" in trace.read_bytes()

    # A shard has another value, which its process sees. All take the step before; then
    # process 0 of four is killed, which held the coordinator.
    many.damage_a_shard(stopped, "params/embed/table")
    ends = many.start(4, 1, f"SIGKILL@{stopped + 2}", of=0)
    assert ends[0][0] == -signal.SIGKILL
    found = (
        f"step {stopped} unreadable (process 1: a shard of params/embed/table differs"
    )
    assert found in ends[0][1]
    assert f"using step {before}" in ends[0][1]
    check_lost(ends, 0, of=4)
    # The disk of one of two is full at a save, which both leave out. Then it hangs: the
    # other ends, and it ends too when it goes on.
    last = many.steps()[-1]
    ends = many.start(
        *(2, 2, f"SIGSTOP@{last + 3}"),
        of=1,
        full=str(last + 1),
        flags=["--train.checkpoint-every=1", "--train.on-save-error=continue"],
    )
    assert many.steps()[-2:] == [last, last + 2]
    failed = f"checkpoints/{last + 1} cannot be written (process 1: "
    assert failed in ends[0][1] and "File too large" in ends[0][1]
    check_lost(ends, 1, of=2)
    assert ends[1][0] == EXIT_PROCESS_LOST
    assert "error: process 1 of 2 was given up by the others" in ends[1][1]
    # A process alone, with as many devices in another mesh, ends the run.
    [(code, text)] = many.start(1, 4, flags=["--mesh.data=1", "--mesh.fsdp=4"])
    assert code == 0, text

    [(code, text)] = straight.start(1, 4, flags=[initial])
    assert code == 0, text
    rows = straight.rows()
    assert len(rows) == 8 * STEPS
    assert many.rows() == rows
    one, other = (
        {
            row["step"]: row["loss"]
            for row in read_metrics(hosts.path)
            if row["kind"] == "train"
        }
        for hosts in (straight, many)
    )
    assert one.keys() == other.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose([*one.values()], [*other.values()], rtol=2e-6)
    first, second = (tree.flatten(load(hosts.path)[1]) for hosts in (straight, many))
    for name, value in first.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(
            value, second[name], atol=1e-4 * largest, rtol=0, err_msg=name
        )
    evaluations = [
        [row["loss"] for row in read_metrics(hosts.path) if row["kind"] == "eval"]
        for hosts in (straight, many)
    ]
    assert len(evaluations[0]) == 3
    np.testing.assert_allclose(*evaluations, rtol=2e-6)

    # The time of all four starts; the one that was killed may have left no row.
    [*_, row] = rows = [r for r in read_metrics(many.path) if r["kind"] == "train"]
    starting = [row["time_s"]["starting"] for row in rows]
    assert starting == sorted(starting) and len({*starting}) >= 3
    assert all(row["time_s"][kind] > 0 for kind in ("steps", "saving", "compiling"))
