"""Trains, kills and resumes a tiny run, with random faults, for a given time.

python benchmarks/soak.py [--minutes 60] [--seed 0] [--folder FOLDER]

One run is trained without a stop. Then the same run is started again and again in other
folders: each start is ended at a random moment (SIGKILL, SIGTERM, SIGINT) or not at
all, and before a start something may be damaged (`FAULTS`). When such a run is done,
its state must be that of the first one, bit for bit, and so must each row of its
metrics. Rows that a fault took may be missing. No start may print a traceback or end
with another code than its end explains.

Writes counts to benchmarks/results/soak.json, by seed, after each run; exits with 1 if
anything differed. A folder that differed is kept.
"""

import argparse
import collections
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_step import machine

from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native.integrity import state_hash, verify
from jaxlm.checkpoint.native.run_folder import list_steps
from jaxlm.train.metrics import read_metrics

REPOSITORY = Path(__file__).parents[1]
RESULT = REPOSITORY / "benchmarks" / "results" / "soak.json"
STEPS = 120
FLAGS = shlex.split("""
--model.num-layers 2 --model.model-dim 32 --model.num-heads 4 --model.num-kv-heads 2
--model.head-dim 8 --model.hidden-dim 48 --model.context-length 64 --model.dtype float32
--data.sequence-length 32 --data.workers 1 --train.batch-size 4
--train.accumulation-steps 2 --train.log-every 1 --train.eval-every 16
--train.sample-every 25 --train.sample-tokens 8 --train.checkpoint-every 4
--train.skip-spikes 3 --optimizer.warmup-steps 5 --optimizer.learning-rate 1e-2
""")
# Signal (None: it runs to its end) and the exit codes that it explains. A start that is
# not ready yet dies of its signal; one that was just done has code 0.
ENDS = {
    None: {0},
    signal.SIGKILL: {-9, 0},
    signal.SIGTERM: {75, -15, 0},
    signal.SIGINT: {130, -2, 0},
}
FILE_KIB = 20
COMPARED = ("kind", "step", "loss", "grad_norm", "lr", "bits_per_byte", "text")
FAULTS = ("newest step", "log", "full disk", "cache is a file", "compiled programs")


class Soak:
    """The runs of a soak, their faults, and what was found."""

    def __init__(self, folder: Path, seed: int):
        """Works in `folder`; all but the timing follows from `seed`."""
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        words = [
            "".join(self.rng.choices("abcdefgh", k=self.rng.randint(2, 6)))
            for _ in range(60)
        ]
        text = " ".join(self.rng.choices(words, k=1200))
        (folder / "text.txt").write_text(text)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_PLATFORMS": "cpu",
        }
        (folder / "a file").write_text("")

    def start(self, run: Path, fault: str | None = None) -> subprocess.Popen:
        """Starts training in the folder `run`."""
        environment = dict(self.environment)
        if fault == "cache is a file":
            environment["XDG_CACHE_HOME"] = str(self.folder / "a file")
        command = [sys.executable, str(REPOSITORY / "train.py"), *FLAGS]
        if fault == "full disk":  # No file can be larger.
            command = ["bash", "-c", f'ulimit -f {FILE_KIB}; exec "$@"', "-", *command]
        where = ["--data.path", str(self.folder / "text.txt")]
        where += ["--train.run-dir", str(run), "--train.steps", str(STEPS)]
        return subprocess.Popen(
            [*command, *where],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def straight(self) -> None:
        """Trains the run that the others are compared with."""
        self.reference = self.folder / "straight"
        began = time.monotonic()
        child = self.start(self.reference)
        _, err = child.communicate()
        if child.returncode:
            raise SystemExit(f"the straight run failed: {err}")
        self.seconds = time.monotonic() - began
        self.expected = course(self.reference)

    def damage(self, run: Path, fault: str, damaged: set[int]) -> bool:
        """Damages something of a run that is at rest; returns whether it could.

        `damaged` has the steps that were damaged before: one sound step stays.
        """
        if fault == "newest step":
            steps = [step for step in list_steps(run) if step not in damaged]
            if len(steps) < 2 or max(steps) != max(list_steps(run)):
                return False
            damaged.add(steps[-1])
            step = run / "checkpoints" / str(steps[-1])
            files = sorted(path for path in step.rglob("*") if path.is_file())
            return self._damage_file(self.rng.choice(files))
        if fault == "log":
            log = run / "metrics.jsonl"
            return log.exists() and log.stat().st_size > 0 and self._flip(log)
        if fault == "compiled programs":
            files = sorted((self.folder / "cache" / "jaxlm" / "xla").glob("*-cache"))
            for path in files:
                self._cut(path)
            return bool(files)
        return True  # The start itself gets the fault.

    def _damage_file(self, path: Path) -> bool:
        way = self.rng.choice((self._flip, self._cut, Path.unlink))
        if way == self._flip and not path.stat().st_size:
            return False
        return way(path) is not False

    def _flip(self, path: Path) -> bool:
        data = bytearray(path.read_bytes())
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(data)
        return True

    def _cut(self, path: Path) -> bool:
        os.truncate(path, self.rng.randrange(path.stat().st_size + 1))
        return True

    def one_run(self, number: int, until: float) -> bool:
        """Starts one run until it is done; returns whether it was, before `until`."""
        run, flips = self.folder / f"run{number}", 0
        damaged: set[int] = set()
        while time.monotonic() < until:
            fault = self.rng.choice((None, None, *FAULTS))
            if fault and not self.damage(run, fault, damaged):
                fault = None
            flips += fault == "log"
            end = self.rng.choice((*ENDS, *list(ENDS)[1:]))
            child = self.start(run, fault)
            if end is not None:
                self._wait_for_a_moment(child, run)
                child.send_signal(end)
            _, err = child.communicate()
            code = child.returncode
            self.counts[f"end: {'none' if end is None else end.name}"] += 1
            self.counts[f"fault: {fault or 'none'}"] += 1
            self.counts[f"code: {code}"] += 1
            self.counts["steps that were fallen back from"] += ", using step " in err
            allowed = ENDS[end] | ({2} if fault == "full disk" else set())
            if code not in allowed or "Traceback" in err:
                self.wrong.append(f"run {number}: code {code} after {end}: {err}")
                return True
            damaged &= set(list_steps(run))
            if code == 0:
                self._compare(run, flips)
                return True
        return False

    def _wait_for_a_moment(self, child: subprocess.Popen, run: Path) -> None:
        """Waits for a random time, or (more often) until the log has a random size."""
        log, began = run / "metrics.jsonl", time.monotonic()
        seconds = self.rng.uniform(0.05, 1.0) * self.seconds
        size, whole = 1 << 60, (self.reference / "metrics.jsonl").stat().st_size
        if self.rng.random() < 0.75:
            seconds, now = 1e9, log.stat().st_size if log.exists() else 0
            size = self.rng.randrange(now, max(now, whole) + 1)
        while child.poll() is None and time.monotonic() - began < seconds:
            if log.exists() and log.stat().st_size > size:
                return
            time.sleep(0.002)

    def _compare(self, run: Path, flips: int) -> None:
        found, expected = course(run), self.expected
        lost = found["lost_rows"]
        wrong = [name for name in ("params", "state") if found[name] != expected[name]]
        wrong += [f"row {row}" for row in found["rows"] if row not in expected["rows"]]
        missing = [row for row in expected["rows"] if row not in found["rows"]]
        # A flip may turn a line end into something else: then it costs two rows.
        if len(missing) > 2 * flips + lost:
            wrong.append(f"{len(missing)} rows are missing: {missing[:3]}")
        self.counts["runs that were done"] += 1
        self.counts["rows that faults took"] += len(missing)
        if wrong:
            self.wrong.append(f"{run.name}: {'; '.join(wrong)[:2000]}")
        else:
            self.counts["runs that were equal bit for bit"] += 1
            shutil.rmtree(run)


def course(run: Path) -> dict[str, Any]:
    """Returns all that must be equal in two runs, and the number of rows lost."""
    step = run / "checkpoints" / str(STEPS)
    verify(step)
    rows = read_metrics(run)
    return {
        "params": state_hash(load(run)[1]),
        # Of all parameters, of the optimizer and of the history of spikes.
        "state": json.loads((step / "meta.json").read_bytes())["state_hash"],
        "rows": [
            [row.get(name) for name in COMPARED]
            for row in rows
            if row["kind"] != "event"
        ],
        "lost_rows": sum(row.get("lost_rows", 0) for row in rows),
    }


def main() -> None:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="jaxlm-soak-"))
    folder.mkdir(exist_ok=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    soak, began = Soak(folder, arguments.seed), time.monotonic()
    soak.straight()
    until, number = began + 60 * arguments.minutes, 0
    while time.monotonic() < until and len(soak.wrong) < 10:
        number += 1
        soak.one_run(number, until)
        starts = sum(n for name, n in soak.counts.items() if name.startswith("end: "))
        result = {
            "minutes": round((time.monotonic() - began) / 60, 1),
            "steps": STEPS,
            "starts": starts,
            "wrong": soak.wrong,
            "counts": dict(sorted(soak.counts.items())),
            "machine": machine(),
        }
        results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        results[f"seed {arguments.seed}"] = result
        RESULT.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if arguments.folder is None and not soak.wrong:
        shutil.rmtree(folder)
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
