"""How long several processes of a run take to stop together, and to miss one of them.

python benchmarks/hosts.py [--rounds 3] [--heartbeat 6]

Two and four processes train a small model on this machine. In each round three runs of
either number end: by SIGTERM at the last process, by SIGKILL of the last one, and by
SIGKILL of process 0. What is measured, on the clock of this script:

- seconds from SIGTERM until all have saved the same step, and until they have ended:
  process 0 writes a report in between;
- heartbeats from SIGKILL until all others have ended, each with one line and code 76.

Then it runs `tests/multi_process`, which stops, kills and resumes a run in one, two and
four processes, and measures its seconds. Writes all to benchmarks/results/hosts.json.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from train_step import foreign_cores, machine

from jaxlm.checkpoint.native.run_folder import list_steps
from jaxlm.terminal.exit_codes import EXIT_PREEMPTED, EXIT_PROCESS_LOST
from jaxlm.train.metrics import read_metrics

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "hosts.json"
FLAGS = shlex.split("""
--model.num-layers 1 --model.model-dim 32 --model.num-heads 4 --model.num-kv-heads 2
--model.head-dim 8 --model.hidden-dim 48 --model.context-length 64 --model.dtype float32
--data.sequence-length 32 --data.tokenizer bytes --data.workers 1 --mesh.data -1
--train.batch-size 8 --train.steps 1000000 --train.log-every 1 --train.eval-every 0
--train.sample-every 0 --train.checkpoint-every 0
""")


def start(folder: Path, count: int, heartbeat_s: float) -> list[subprocess.Popen]:
    """Starts the processes of a run, and waits until ten steps are in its log."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    text = folder / "text.txt"
    text.write_text(" ".join(map(str, range(3000))))
    flags = [f"--data.path={text}", f"--train.run-dir={folder / 'run'}"]
    flags += [f"--processes.coordinator=localhost:{port}", f"--processes.count={count}"]
    flags += [f"--processes.heartbeat-seconds={heartbeat_s}"]
    children = []
    for index in range(count):
        command = [sys.executable, str(REPOSITORY / "train.py"), *FLAGS, *flags]
        with open(folder / f"{index}.txt", "w") as said:
            child = subprocess.Popen(
                [*command, f"--processes.index={index}"],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        children.append(child)
    while rows(folder) < 10:
        assert all(child.poll() is None for child in children), said_by(folder, 0)
        time.sleep(0.1)
    return children


def rows(folder: Path) -> int:
    """Returns how many steps the log of a run has."""
    if not (folder / "run" / "metrics.jsonl").exists():
        return 0
    return sum(row["kind"] == "train" for row in read_metrics(folder / "run"))


def wait(children: list[subprocess.Popen]) -> None:
    """Waits until all have ended."""
    for child in children:
        child.wait()


def said_by(folder: Path, index: int) -> list[str]:
    """Returns the lines of a process that name an error."""
    lines = (folder / f"{index}.txt").read_text().splitlines()
    return [line for line in lines if "error" in line]


def measured(count: int, heartbeat_s: float) -> dict[str, float]:
    """Returns seconds and heartbeats of three runs of `count` processes."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = start(folder, count, heartbeat_s)
        before = rows(folder)
        began = time.monotonic()
        children[-1].send_signal(signal.SIGTERM)
        while not list_steps(folder / "run"):
            assert children[0].poll() is None, said_by(folder, 0)
            time.sleep(0.02)
        found["SIGTERM at the last, s until saved"] = time.monotonic() - began
        wait(children)
        found["SIGTERM at the last, s until ended"] = time.monotonic() - began
        assert {child.returncode for child in children} == {EXIT_PREEMPTED}
        [step] = list_steps(folder / "run")
        assert step >= before
    for of in (count - 1, 0):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            children = start(folder, count, heartbeat_s)
            began = time.monotonic()
            children[of].kill()
            wait(children)
            seconds = time.monotonic() - began
            for index, child in enumerate(children):
                if index != of:
                    assert child.returncode == EXIT_PROCESS_LOST
                    assert len(said_by(folder, index)) == 1
        found[f"SIGKILL of process {of}, heartbeats"] = seconds / heartbeat_s
    return {name: round(value, 3) for name, value in found.items()}


def time_test() -> float:
    """Runs the test of several processes; returns its seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--run-slow"]
    began = time.monotonic()
    subprocess.run([*command, "tests/multi_process"], cwd=REPOSITORY, check=True)
    return round(time.monotonic() - began, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heartbeat", type=float, default=6.0)
    arguments = parser.parse_args()
    loads, runs = [], {}
    for _ in range(arguments.rounds):
        for count in (2, 4):
            loads.append(round(foreign_cores(), 2))
            run = measured(count, arguments.heartbeat)
            print(f"{count} processes: {run}", flush=True)
            runs.setdefault(f"{count} processes", []).append(run)
    results = {
        name: {
            key: {
                "median": statistics.median(run[key] for run in several),
                "most": max(run[key] for run in several),
            }
            for key in several[0]
        }
        for name, several in runs.items()
    }
    results |= {
        "tests/multi_process, s": time_test(),
        "heartbeat_s": arguments.heartbeat,
        "rounds": arguments.rounds,
        "cores_used_by_others": loads,
        "jax": jax.__version__,
        "machine": machine(),
    }
    print(json.dumps(results, indent=1))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
