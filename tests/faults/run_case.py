"""Tiny runs of train.py in child processes, and the comparison of two runs."""

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from forked_case import Forked

from jaxlm import cli
from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native.integrity import state_hash
from jaxlm.commands import train
from jaxlm.data.loader import place
from jaxlm.terminal import interrupts
from jaxlm.train.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
STEPS = 12

CONFIG = """
'''A tiny run.'''
from jaxlm.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
                          head_dim=8, hidden_dim=48, context_length=64,
                          dtype="float32"),
        data=DataConfig(path=({text!r},), sequence_length=32, workers=1),
        optimizer=OptimizerConfig(warmup_steps=3, learning_rate=1e-2),
        train=TrainConfig(steps=12, batch_size=4, accumulation_steps=2, log_every=1,
                          eval_every=5, sample_every=4, sample_tokens=8,
                          checkpoint_every=3, run_dir={run!r}),
    )
"""


def train_with_faults(*arguments):
    """Runs `jaxlm train`, writes a line for each batch, and raises a signal or a fault.

    FAULT is `SIGTERM@5` or another action at a given step; `evaluation-SIGTERM@2` comes
    in this process's second evaluation.
    """
    action, _, at = os.environ["FAULT"].partition("@")
    real_batches, real_make_hooks = train.batches, train.make_hooks

    def batches(dataset, batch_size, start_step, *rest):
        taken = real_batches(dataset, batch_size, start_step, *rest)
        for step, batch in enumerate(taken, start_step + 1):
            if at and step == int(at) and not action.startswith("evaluation"):
                if action in ("SIGKILL", "SIGTERM", "SIGINT"):
                    os.kill(os.getpid(), getattr(signal, action))
                elif action == "swap":  # with the batch after it
                    batch = place(
                        lambda rows, step=step: dataset.train_batch(
                            step, batch_size, rows
                        ),
                        (batch_size, dataset.sequence_length),
                        rest[0],
                    )
                elif action == "nan":
                    weights = batch.loss_weights * float("nan")
                    batch = dataclasses.replace(batch, loss_weights=weights)
                elif action == "delete":
                    shutil.rmtree(os.environ["RUN"])
                elif action == "fill":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
                elif action == "wait":
                    # The save before, in a thread, has ended, and a second signal is
                    # no new one however long it takes to come.
                    while "checkpoint-" in str(threading.enumerate()):
                        time.sleep(0.01)
                    interrupts._REPEAT_SECONDS = 3600.0
                    print("waiting", flush=True)
                    time.sleep(3600)
            digest = hashlib.sha256()
            for leaf in jax.tree.leaves(batch):
                digest.update(np.asarray(leaf).tobytes())
            with open(os.environ["RECORD"], "a") as record:
                print(step, digest.hexdigest(), file=record)
            yield batch

    def make_hooks(*arguments):
        real, count = real_make_hooks(*arguments), 0

        def held_out():
            nonlocal count
            count += 1
            for batch in real.held_out():
                if count == int(at):
                    os.kill(os.getpid(), getattr(signal, action.partition("-")[2]))
                yield batch

        if not action.startswith("evaluation"):
            return real
        return dataclasses.replace(real, held_out=held_out)

    train.batches, train.make_hooks = batches, make_hooks
    train.STARTED = time.monotonic()
    names = {"prog": "python train.py", "sample_command": "python sample.py"}
    sys.exit(cli.run("train", arguments, **names))


def make_text(length=900, seed=0):
    """Makes words of a small alphabet: 900 characters are 25 training rows, 2 epochs."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(50)]
    text = ""
    while len(text) < length:
        text += rng.choice(words) + rng.choice(" \n")
    return text[:length]


class Run:
    """A run folder in `folder/name`, and the children that train in it."""

    def __init__(self, folder, name="run", config=CONFIG):
        self.folder = Path(folder)
        self.path = self.folder / name
        self.record = self.folder / f"{name}.batches"
        text = self.folder / "text.txt"
        if not text.exists():
            text.write_text(make_text())
        self.config = self.folder / f"{name}.py"
        self.config.write_text(config.format(text=str(text), run=str(self.path)))

    def start(self, *flags, fault=""):
        """Starts a process that trains."""
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "RECORD": str(self.record),
            "RUN": str(self.path),
            "FAULT": fault,
        }
        return Forked(
            *(train_with_faults, str(self.config), *flags),
            output=self.config,
            environment=os.environ | environment,
            folder=self.folder,
        )

    def train(self, *flags, fault=""):
        """Trains until the process ends; returns its exit code, stdout and stderr."""
        child = self.start(*flags, fault=fault)
        code = child.wait(1000)
        return code, child.out, child.err

    def steps(self):
        folder = self.path / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())

    def meta(self, step):
        file = self.path / "checkpoints" / str(step) / "meta.json"
        return json.loads(file.read_text())

    def course(self):
        """Returns all that must be bitwise equal in two runs of one config."""
        rows = read_metrics(self.path)
        trains = [row for row in rows if row["kind"] == "train"]
        _, params = load(self.path)
        return {
            "params": state_hash(params),
            # Of the parameters and every leaf of the optimizer; restoring checks it.
            "state": self.meta(STEPS)["state_hash"],
            "train": [
                (r["step"], *(float(r[n]).hex() for n in ("loss", "grad_norm", "lr")))
                for r in trains
            ],
            "tokens": [r["tokens"] for r in trains],
            "eval": [
                (r["step"], r["loss"].hex(), r["bits_per_byte"].hex(), r["targets"])
                for r in rows
                if r["kind"] == "eval"
            ],
            "sample": [
                (r["step"], r["prompt"], r["text"])
                for r in rows
                if r["kind"] == "sample"
            ],
            "batches": self.batches(),
        }

    def batches(self):
        """Maps each step to the hash of its batch, which must be the same each time."""
        taken = {}
        for line in self.record.read_text().splitlines():
            step, digest = line.split()
            assert taken.setdefault(int(step), digest) == digest, f"step {step}"
        return taken


def differences(one, other):
    """Returns the names of the parts in which two courses differ."""
    return {name for name in one if one[name] != other[name]}
