"""Compares training throughput with peers at the same shapes, in one run.

python benchmarks/train_step.py --peer-python PATH [--nanogpt FOLDER] [--rounds 3]

Alternates between jaxlm and each peer in separate processes, `rounds` times, and prints
the medians, their ratio, and the share of this machine's matmul peak. PATH is a Python
with torch and transformers; FOLDER is a clone of nanoGPT. Results go to
benchmarks/results/train_step.json. Run it on a quiet machine: the script stops if other
processes use more than a fifth of a core.

With `--before FOLDER`, a checkout of an earlier commit, that one is the peer, with its
own script and the malloc options of train.py; who is first alternates, and results go
to benchmarks/results/train_step_before.json. `taskset -c 0` gives all one core.

On a GPU, take `--case llama3.2-1b`: there torch compiles its model, with PyTorch's own
flash attention. jaxlm runs rows of one document, as the peer does, and packed rows.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jaxlm.commands.process import MALLOC_OPTIONS
from jaxlm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxlm.fields import to_dict
from jaxlm.model.presets import preset

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "train_step.json"
BEFORE_RESULTS = HERE / "results" / "train_step_before.json"


@dataclass(frozen=True)
class Case:
    """A shape, and the peer timed at it."""

    batch: int
    peer: str
    model: ModelConfig
    loss_chunk: int = 0
    documents: int = 1
    """In a packed row, timed beside rows of one document if more than one."""


CASES = {
    "smollm2-135m": Case(
        4, "transformers", replace(preset("smollm2-135m"), context_length=256)
    ),
    "nanogpt-baby": Case(
        16,
        "nanogpt",
        ModelConfig(
            vocab_size=65,
            num_layers=6,
            model_dim=384,
            num_heads=6,
            num_kv_heads=6,
            head_dim=64,
            hidden_dim=1536,
            context_length=256,
            position="learned",
            norm="layer",
            norm_epsilon=1e-5,
            gated=False,
            activation="gelu",
        ),
    ),
    # For one accelerator of 80 GB.
    "llama3.2-1b": Case(
        4,
        "transformers",
        replace(preset("llama3.2-1b"), context_length=4096),
        loss_chunk=4096,
        documents=8,
    ),
}


def measure_peak_flops(dtype, seconds: float = 0.2) -> float:
    """Measures FLOP/s: the best of several 1024 x 1024 x 1024 matmuls on all cores.

    For CPUs, whose vendors publish no such figure. Accumulates in f32.
    """
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1024, 1024), dtype)
    matmul = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    matmul(x, x).block_until_ready()  # compiles
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def time_jaxlm(name: str, dtype: str, steps: int, documents: int) -> dict:
    """Times steps of jaxlm in this process, on rows of so many documents."""
    import jax
    import numpy as np

    from jaxlm.sharding import rules
    from jaxlm.sharding.mesh import make_mesh
    from jaxlm.train.optimizer import make_optimizer
    from jaxlm.train.state import init_state
    from jaxlm.train.step import make_train_step
    from jaxlm.train.throughput import flops_per_token, published_peak_flops
    from jaxlm.types import Batch

    case = CASES[name]
    B, T = case.batch, case.model.context_length
    # Up to eight layers compile fast enough unrolled, and run faster that way.
    unroll = 0 if case.model.num_layers <= 8 else 1
    config = Config(
        model=replace(case.model, dtype=dtype, unroll_layers=unroll),
        data=DataConfig(sequence_length=T),
        optimizer=OptimizerConfig(learning_rate=1e-3, b2=0.99, schedule="constant"),
        train=TrainConfig(batch_size=B, loss_chunk=case.loss_chunk),
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(0, case.model.vocab_size, (B, T + 1)).astype(np.int32)
    # The same documents in each row.
    starts = np.sort(rng.permutation(np.arange(1, T))[: documents - 1])
    segments = (np.arange(T)[:, None] >= starts).sum(axis=1)
    positions = np.arange(T) - np.insert(starts, 0, 0)[segments]
    batch = Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=np.tile(positions.astype(np.int32), (B, 1)),
        segment_ids=np.tile(segments.astype(np.int32) + 1, (B, 1)),
        loss_weights=np.ones((B, T), np.float32),
    )
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = init_state(config.model, optimizer, 0, mesh)
        batch = jax.device_put(batch, rules.batch_sharding(mesh))
        train_step = make_train_step(config, optimizer)
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        first_loss = float(metrics.loss)
        compile_s = time.perf_counter() - start
        seconds = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            state, metrics = train_step(state, batch)
            last_loss = float(metrics.loss)
            seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[2:],
        "first_step_s": compile_s,
        "losses": [first_loss, last_loss],
        "flops_per_token": flops_per_token(config.model, T),
        "peak_flops": published_peak_flops(jax.devices()[0].device_kind)
        or measure_peak_flops(jax.numpy.dtype(dtype)),
        "device": jax.devices()[0].device_kind,
        "version": jax.__version__,
    }


def child(command: list[str], **environment: str) -> dict:
    """Runs a command, and parses its last line of output as JSON."""
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def foreign_cores(seconds: float = 2.0) -> float:
    """Measures how many cores other processes use (Linux)."""

    def busy() -> float:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        idle = int(fields[3]) + int(fields[4])
        return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / seconds


def compare(name: str, arguments: argparse.Namespace) -> dict:
    """Alternates between jaxlm and the peer of a case."""
    case = CASES[name]
    tokens = case.batch * case.model.context_length
    documents = {"jaxlm": 1}
    if case.documents > 1:
        documents[f"jaxlm, {case.documents} documents a row"] = case.documents
    runs: dict[str, list[dict]] = {name: [] for name in (*documents, case.peer)}
    same = ["--dtype", arguments.dtype, "--steps", str(arguments.steps)]
    ours = [sys.executable, __file__, "--child", name, *same]
    peer = [arguments.peer_python, str(HERE / "peer_train.py"), case.peer, *same]
    peer += ["--batch", str(case.batch), "--model", json.dumps(to_dict(case.model))]
    if case.peer == "nanogpt":
        peer += ["--nanogpt", arguments.nanogpt]
    for round_number in range(arguments.rounds):
        load = foreign_cores()
        if load > 0.2 and not arguments.even_if_busy:
            raise SystemExit(
                f"other processes use {load:.1f} cores: wait, or pass --even-if-busy"
            )
        # jaxlm runs with the malloc options of train.py, the peer with its defaults.
        for system, number in documents.items():
            command = [*ours, "--documents", str(number)]
            runs[system].append(child(command, GLIBC_TUNABLES=MALLOC_OPTIONS))
        runs[case.peer].append(child(peer, GLIBC_TUNABLES=""))
        print(
            f"{name}: round {round_number + 1} of {arguments.rounds}", file=sys.stderr
        )
    rates = {
        system: [tokens / statistics.median(r["seconds"]) for r in results]
        for system, results in runs.items()
    }
    median = {system: statistics.median(values) for system, values in rates.items()}
    first = runs["jaxlm"][0]
    share = median["jaxlm"] * first["flops_per_token"] / first["peak_flops"]
    return {
        "batch": case.batch,
        "length": case.model.context_length,
        "dtype": arguments.dtype,
        "device": first["device"],
        "tokens_per_s": rates,
        "median_tokens_per_s": median,
        "ratio": median["jaxlm"] / median[case.peer],
        "share_of_peak": share,
        "peak_gflops": first["peak_flops"] / 1e9,
        "first_step_s": {s: r[0]["first_step_s"] for s, r in runs.items()},
        "versions": {s: r[0]["version"] for s, r in runs.items()},
    }


def compare_before(name: str, arguments: argparse.Namespace) -> dict:
    """Alternates between an earlier commit and this one, each with its own script."""
    folders = {"before": Path(arguments.before).resolve(), "after": HERE.parent}
    same = ["--child", name, "--dtype", arguments.dtype, "--steps"]
    runs: dict[str, list[dict]] = {side: [] for side in folders}
    loads = []
    for round_number in range(arguments.rounds):
        loads.append(round(foreign_cores(), 2))
        for side in list(folders)[:: -1 if round_number % 2 else 1]:
            script = str(folders[side] / "benchmarks" / "train_step.py")
            environment = {"PYTHONPATH": str(folders[side])}
            environment["GLIBC_TUNABLES"] = MALLOC_OPTIONS
            command = [sys.executable, script, *same, str(arguments.steps)]
            runs[side].append(child(command, **environment))
        print(f"{name}: round {round_number + 1}", file=sys.stderr)
    medians = {
        side: [statistics.median(run["seconds"]) for run in found]
        for side, found in runs.items()
    }
    before, after = (statistics.median(medians[side]) for side in folders)
    return {
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)),
        "other_cores": loads,
        "median_s_of_runs": medians,
        "seconds_after_by_before": after / before,
        "losses": {side: found[0]["losses"] for side, found in runs.items()},
        "jax": runs["after"][0]["version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="Python with torch and transformers")
    parser.add_argument("--nanogpt", help="clone of nanoGPT")
    parser.add_argument("--before", help="a checkout of an earlier commit, as the peer")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--even-if-busy", action="store_true")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--documents", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        result = time_jaxlm(
            arguments.child, arguments.dtype, arguments.steps, arguments.documents
        )
        print(json.dumps(result))
        return
    if arguments.before:
        results = {}
        if BEFORE_RESULTS.exists():
            results = json.loads(BEFORE_RESULTS.read_text())
        for name in arguments.case or ["nanogpt-baby"]:
            result = compare_before(name, arguments)
            results[f"{name}, {arguments.dtype}"] = result
            print(json.dumps(result, indent=2))
            BEFORE_RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        return
    if arguments.peer_python is None:
        parser.error("--peer-python is needed: a Python with torch and transformers")
    names = arguments.case or ["smollm2-135m", "nanogpt-baby"]
    if arguments.nanogpt is None and "nanogpt-baby" in names:
        parser.error("--nanogpt is needed: the folder of a clone of nanoGPT")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    results["machine"] = machine()
    for name in names:
        result = results["cases"][name] = compare(name, arguments)
        print(f"{name} ({result['dtype']})")
        for system, rate in result["median_tokens_per_s"].items():
            print(f"  {system:14} {rate:9.0f} tokens/s")
        print(
            f"  ratio {result['ratio']:.2f}, {result['share_of_peak']:.0%} of "
            f"{result['peak_gflops']:.0f} GFLOP/s"
        )
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(RESULTS)


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
