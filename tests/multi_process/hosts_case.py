"""Runs of train.py in several processes, one of which is stopped, hung or killed."""

import hashlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
from forked_case import Forked

from jaxlm import cli
from jaxlm.checkpoint.native import integrity, run_folder
from jaxlm.commands import train
from jaxlm.report import live
from jaxlm.sharding.processes import Agreement

real_batches, real_close = train.batches, Agreement.close
real_report = live.write_report
HEARTBEAT_S = 6.0
STEPS = 10
closed = []  # The agreements that this process has heard of.

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
        train=TrainConfig(steps=10, batch_size=8, log_every=1, eval_every=4,
                          eval_batches=2, sample_every=0, sample_tokens=4,
                          checkpoint_every=2, run_dir={run!r}, compile_cache=False),
    )
"""


def batches(dataset, batch_size, start_step, *rest):
    """The batches of a run, with what goes wrong.

    Writes the hash of each row that this process gives to its devices. FAULT=SIGTERM@5
    raises a signal when the batch of step 5 is asked for, and FULL=4 lets no file grow
    from the batch of step 4 until its save, which goes on beside later steps, has ended.
    """
    action, _, at = os.environ["FAULT"].partition("@")
    full, unlimited = int(os.environ["FULL"] or -1), resource.RLIM_INFINITY
    with open(os.environ["RECORD"], "a") as record:
        for step, batch in enumerate(
            real_batches(dataset, batch_size, start_step, *rest)
        ):
            step += start_step + 1
            if step == full + 1:
                wait_for_save()
            limit = 0 if step == full else unlimited
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
            if at and step == int(at):
                if action == "SIGSTOP":
                    wait_for_save()
                print("raises", action, flush=True, file=sys.__stderr__)
                os.kill(os.getpid(), getattr(signal, action))
            # Steps take far less than the processes to agree, or to give this one up.
            if at and step > int(at):
                wait_until(lambda: closed and closed[0]._is_known.is_set())
            for shard in batch.tokens.addressable_shards if step != full else ():
                first = shard.index[0].indices(batch_size)[0]
                for number, row in enumerate(np.asarray(shard.data)):
                    digest = hashlib.sha256(row.tobytes()).hexdigest()
                    print(step, first + number, digest, file=record, flush=True)
            yield batch


def wait_for_save():
    wait_until(lambda: "checkpoint" not in str(threading.enumerate()))


def wait_until(is_so):
    while not is_so():
        time.sleep(0.05)


def close(agreement, value):
    closed.append(agreement)
    real_close(agreement, value)


def write_report(runs, path, **options):
    print("writes the report", flush=True, file=sys.__stderr__)
    real_report(runs, path, **options)


def run_train(*arguments):
    train.batches, Agreement.close = batches, close
    live.write_report = write_report
    sys.exit(cli.run("train", arguments, prog="jaxlm train"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def is_stopped(child):
    state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2]
    return state.split()[0] == "T"


class Hosts:
    """A run folder, and its starts with any number of processes."""

    def __init__(self, folder, text):
        self.path = folder / "run"
        self.folder = folder
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(text=str(text), run=str(self.path)))

    def start(
        self, processes, devices, fault="", of=0, full="", flags=(), last_flags=()
    ):
        """Starts processes and waits for all; faults happen in process `of`.

        The last one gets `last_flags` too. One that hangs goes on when the others have
        ended.

        Returns:
          (exit code, stderr) of each.
        """
        port, children = free_port(), []
        for index in range(processes):
            count = f"--xla_force_host_platform_device_count={devices}"
            environment = {
                **os.environ,
                "XLA_FLAGS": f"{count} {os.environ['XLA_FLAGS']}",
                "RECORD": str(self.folder / "rows.txt"),
                "FAULT": fault if index == of else "",
                "FULL": full if index == of else "",
            }
            arguments = [
                f"--processes.coordinator=localhost:{port}",
                f"--processes.count={processes}",
                f"--processes.index={index}",
                f"--processes.heartbeat-seconds={HEARTBEAT_S}",
                *flags,
                *(last_flags if index == processes - 1 else ()),
            ]
            child = Forked(
                *(run_train, str(self.config), *arguments),
                output=self.folder / str(index),
                environment=environment,
                folder=self.folder,
            )
            children.append(child)
        others = [child for index, child in enumerate(children) if index != of]
        if "SIGSTOP" in fault:
            wait_until(lambda: is_stopped(children[of]))
            wait_until(lambda: all(child.code is not None for child in others))
            os.kill(children[of].pid, signal.SIGCONT)
        wait_until(lambda: all(child.code is not None for child in children))
        return [(child.code, child.err) for child in children]

    def rows(self):
        """Hash of each (step, row) that a process has given to its devices."""
        found = {}
        for line in (self.folder / "rows.txt").read_text().splitlines():
            step, row, digest = line.split()
            assert found.setdefault((int(step), int(row)), digest) == digest
        return found

    def steps(self):
        return run_folder.list_steps(self.path)

    def meta(self, step):
        return json.loads(
            (self.path / "checkpoints" / str(step) / "meta.json").read_text()
        )

    def damage_a_shard(self, step, name):
        """Gives the last shard of an array another hash, under a right manifest."""
        folder, meta = self.path / "checkpoints" / str(step), self.meta(step)
        meta["shard_hashes"][name][max(meta["shard_hashes"][name])] = "0" * 64
        (folder / "meta.json").write_text(json.dumps(meta))
        integrity.write_manifest(folder)


def make_text(folder):
    text = folder / "text.txt"
    words = (hashlib.sha256(b"%d" % n).hexdigest()[:5] for n in range(900))
    text.write_text(" ".join(words))
    return text
