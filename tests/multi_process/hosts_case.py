"""Runs of train.py in several processes, one of which is stopped or killed."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HEARTBEAT_S = 4.0
STEPS = 8

CONFIG = """
from jaxlm.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, model_dim=32, num_heads=4, num_kv_heads=2,
                          head_dim=8, hidden_dim=48, context_length=64,
                          dtype="float32"),
        data=DataConfig(sequence_length=32, tokenizer="bytes", workers=1,
                        path=({text!r},)),
        mesh=MeshConfig(data=2, fsdp=2),
        optimizer=OptimizerConfig(warmup_steps=3, learning_rate=1e-2),
        train=TrainConfig(steps=8, batch_size=8, log_every=1, eval_every=4,
                          eval_batches=2, sample_every=0, sample_tokens=4,
                          checkpoint_every=2, run_dir={run!r}, compile_cache=False),
    )
"""

# Runs `jaxlm train` and writes the hash of each row that this process gives to its
# devices. FAULT=SIGTERM@5 raises a signal when the batch of step 5 is asked for.
CHILD = """
import hashlib, os, signal, sys, time
import numpy as np
from jaxlm import cli
from jaxlm.commands import train

action, _, at = os.environ.get("FAULT", "").partition("@")
real = train.batches

def batches(dataset, batch_size, start_step, *rest):
    record = open(os.environ["RECORD"], "a")
    for step, batch in enumerate(real(dataset, batch_size, start_step, *rest)):
        step += start_step + 1
        if at and step == int(at):
            print("raises", action, flush=True, file=sys.__stderr__)
            os.kill(os.getpid(), getattr(signal, action))
        if at and step > int(at):  # Steps take far less than the processes to agree.
            time.sleep(1)
        for shard in batch.tokens.addressable_shards:
            first = shard.index[0].indices(batch_size)[0]
            for number, row in enumerate(np.asarray(shard.data)):
                digest = hashlib.sha256(row.tobytes()).hexdigest()
                print(step, first + number, digest, file=record, flush=True)
        yield batch

train.batches = batches
sys.exit(cli.run("train", sys.argv[1:], prog="jaxlm train"))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Hosts:
    """A run folder, and its starts with any number of processes."""

    def __init__(self, folder, text):
        self.path = folder / "run"
        self.folder = folder
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(text=str(text), run=str(self.path)))

    def start(self, processes, devices, fault="", of=0, flags=()):
        """Starts processes and waits for all; `fault` happens in process `of`.

        Returns:
          (exit code, stderr, seconds) of each.
        """
        port, children = free_port(), []
        for index in range(processes):
            count = f"--xla_force_host_platform_device_count={devices}"
            quick = "--xla_backend_optimization_level=0"
            environment = {
                **os.environ,
                "XLA_FLAGS": f"{count} {quick}",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "RECORD": str(self.folder / "rows.txt"),
                "FAULT": fault if index == of else "",
            }
            arguments = [
                f"--processes.coordinator=localhost:{port}",
                f"--processes.count={processes}",
                f"--processes.index={index}",
                f"--processes.heartbeat-seconds={HEARTBEAT_S}",
                *flags,
            ]
            with (self.folder / f"stderr.{index}").open("w") as stderr:
                child = subprocess.Popen(
                    [sys.executable, "-c", CHILD, self.config, *arguments],
                    env=environment,
                    cwd=REPOSITORY,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            children.append(child)
        ends = {}
        while len(ends) < processes:
            for index, child in enumerate(children):
                if index not in ends and child.poll() is not None:
                    ends[index] = time.monotonic()
            time.sleep(0.05)
        texts = [
            (self.folder / f"stderr.{index}").read_text() for index in range(processes)
        ]
        after = [ends[index] - ends[of] for index in range(processes)]
        codes = [child.returncode for child in children]
        return list(zip(codes, texts, after, strict=True))

    def rows(self):
        """Hash of each (step, row) that a process has given to its devices."""
        found = {}
        for line in (self.folder / "rows.txt").read_text().splitlines():
            step, row, digest = line.split()
            assert found.setdefault((int(step), int(row)), digest) == digest
        return found

    def steps(self):
        names = (path.name for path in (self.path / "checkpoints").iterdir())
        return sorted(int(name) for name in names)

    def meta(self, step):
        return json.loads(
            (self.path / "checkpoints" / str(step) / "meta.json").read_text()
        )


def make_text(folder):
    text = folder / "text.txt"
    words = (hashlib.sha256(b"%d" % n).hexdigest()[:5] for n in range(900))
    text.write_text(" ".join(words))
    return text
