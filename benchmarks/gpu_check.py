"""The gate of the attention kernels: tests and times them on this accelerator.

python benchmarks/gpu_check.py [--out FOLDER] [--interpret] [--no-timings]

What `auto` may choose on a kind of device is licensed here: each kernel runs with the
sizes and the default settings of real models (head_dim 64 and 128, 2,048 tokens), with
each option of the mask, in value and gradient, against the reference in float32, and
twice, to see that the bits are the same. Then `benchmarks/attention.py` times it beside
its peers. On an H100 the tests took a minute.

Writes check_DEVICE.json, the record that `PROVEN` in jaxlm/ops/attention/dispatch.py
asks for, and the timings, in attention_DEVICE.json. `--interpret` runs the same on a
CPU, at small sizes, in Pallas' interpreters: it tests the gate, and licenses nothing.

A kernel that waits forever is ended after `STALL_SECONDS` and counts as failed.
"""

import argparse
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STALL_SECONDS = 90
# Processes that compile at the same time.
WORKERS = 12

# Errors allowed. The oracle has the same 16-bit inputs, in f32. Results, and the
# probabilities and their gradients on the way, are rounded to 8 bits (2 ** -9 of each
# number, at random). An off-by-one in a window of 300 keys would be an error of 0.06.
MAX_ERROR = {"z": 5e-3, "lse": 1e-3, "dq": 1e-2, "dk": 1e-2, "dv": 1e-2, "dsinks": 1e-2}
# The worst row, against the length of a mean row.
MAX_ROW_ERROR = 8

# What each implementation is tested with, by platform. The stock kernels are tested by
# the same gate, to see what it makes of them; they need no license.
IMPLEMENTATIONS = {
    "gpu": ("pallas_gpu, plain", "pallas_gpu, specialized", "cudnn"),
    "tpu": ("pallas_tpu", "splash"),
}
# Options of the mask and the scores; sizes are shares of the number of keys.
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "all keys": {"causal": False},
    "window": {"window": 300 / 2048},
    "segments": {"segments": True},
    "sinks": {"sinks": True},
    "soft cap": {"soft_cap": 20.0},
    "all options": {
        "segments": True,
        "sinks": True,
        "soft_cap": 20.0,
        "window": 300 / 2048,
    },
    "odd length": {"segments": True, "missing": 11},
    "float16": {"dtype": "float16"},
    # A part of a prompt, behind what the cache has already.
    "chunk": {"queries": 1 / 4},
    "decode": {"queries": 1},
    "decode, window, sinks": {"queries": 1, "window": 300 / 2048, "sinks": True},
    "decode, int8": {"queries": 1, "int8": True},
}


@dataclass(frozen=True)
class Case:
    """One call of one implementation."""

    implementation: str
    head_dim: int
    option: str
    length: int = 2048
    batch: int = 2
    heads: int = 8
    kv_heads: int = 2

    @property
    def has_gradient(self) -> bool:
        return not self.option.startswith("decode")

    def __str__(self) -> str:
        return f"{self.implementation}, head_dim {self.head_dim}: {self.option}"


def cases(platform: str, interpret: bool) -> list[Case]:
    """Returns all cases of a platform; small ones for the interpreters."""
    # The interpreters take seconds for a few blocks.
    sizes = {"length": 192, "batch": 1, "heads": 2, "kv_heads": 1} if interpret else {}
    found = [
        Case(name, head_dim, option, **sizes)
        for name in IMPLEMENTATIONS[platform]
        for head_dim in ((32,) if interpret else (64, 128))
        for option in OPTIONS
    ]
    if not interpret:
        found += [Case(n, 256, "causal") for n in IMPLEMENTATIONS[platform]]
    return found


def attention_of(name: str, q: Any, segments: bool, interpret: bool) -> Callable:
    """Returns an implementation with default settings: (q, k, v, spec) -> z, lse."""
    from functools import partial

    from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS as FOUND

    name, _, kernels = name.partition(", ")
    if name == "pallas_gpu":
        from jaxlm.ops.attention.gpu.pallas_gpu import attention, default_settings

        settings = default_settings(q, segments, kernels)
        settings = replace(settings, interpret=interpret)
        return partial(attention, settings=settings)
    if interpret:
        from jaxlm.ops.attention.tpu.pallas_tpu import attention
        from jaxlm.ops.attention.tpu.tpu_blocks import TpuSettings

        return partial(attention, settings=TpuSettings(*(64,) * 5, interpret=True))
    return FOUND[name].run


def inputs(case: Case):
    """Returns q, k, v and the spec of a case."""
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.ops.attention.spec import AttentionSpec, Mask, quantize

    options = OPTIONS[case.option]
    rng = np.random.default_rng(0)
    S = case.length - options.get("missing", 0)
    share = options.get("queries")
    T = S if share is None else int(share * S) if share < 1 else share
    dtype = jnp.dtype(options.get("dtype", "bfloat16"))

    def draw(*shape):
        # Scores of about one: neither flat nor a single peak.
        x = rng.normal(size=shape) * case.head_dim**-0.25
        return jnp.asarray(x, dtype)

    q = draw(case.batch, T, case.heads, case.head_dim)
    k, v = (draw(case.batch, S, case.kv_heads, case.head_dim) for _ in range(2))
    mask: dict[str, Any] = {"causal": options.get("causal", True)}
    if "window" in options:
        mask["window"] = int(options["window"] * case.length)
    if "segments" in options:
        ends = np.sort(rng.integers(1, S, (case.batch, 6)), axis=1)
        ids = (np.arange(S)[None, :, None] >= ends[:, None]).sum(-1) + 1
        ids = jnp.asarray(ids, jnp.int32)
        mask |= {"query_segments": ids, "key_segments": ids}
    if share is not None:
        start = np.array([[S - T], [(S - T) // 2]])[: case.batch]
        mask["query_positions"] = jnp.asarray(start + np.arange(T), jnp.int32)
    others: dict[str, Any] = {"soft_cap": options.get("soft_cap")}
    if "sinks" in options:
        others["sinks"] = jnp.asarray(rng.normal(size=case.heads), jnp.float32)
    if "int8" in options:
        (k, key_scale), (v, value_scale) = quantize(k), quantize(v)
        others |= {"key_scale": key_scale, "value_scale": value_scale}
    return q, k, v, AttentionSpec(1.0, Mask(**mask), **others)


def results(attend: Callable, gradient: bool) -> Callable:
    """Returns a function that runs attention, with all gradients if wanted.

    Its arguments are q, k, v, spec and the weights of z and of the log-sum-exp in the
    sum whose gradient is taken. Returns arrays by name.
    """
    import jax
    import jax.numpy as jnp

    def total(q, k, v, spec, weight, lse_weight):
        z, lse = attend(q, k, v, spec)
        sum_ = jnp.sum(z.astype(jnp.float32) * weight)
        return sum_ + (0 if lse is None else jnp.sum(lse * lse_weight)), (z, lse)

    def run(q, k, v, spec, *weights):
        if not gradient:
            z, lse = attend(q, k, v, spec)
            return {"z": z, "lse": lse}
        grad = jax.grad(total, (0, 1, 2, 3), has_aux=True, allow_int=True)
        (dq, dk, dv, dspec), (z, lse) = grad(q, k, v, spec, *weights)
        found = {"z": z, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        return found if spec.sinks is None else {**found, "dsinks": dspec.sinks}

    return run


@functools.cache
def oracle(case: Case, lse: bool) -> tuple[tuple, dict]:
    """Returns the arguments of `results` and what the reference makes of them, in f32.

    Args:
      case: without an implementation.
      lse: whether the log-sum-exp has a gradient.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.ops.attention.reference import reference_attention
    from jaxlm.ops.attention.spec import dequantize

    q, k, v, spec = inputs(case)
    rng = np.random.default_rng(1)
    shapes = (q.shape, (q.shape[0], q.shape[2], q.shape[1]))
    weights = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    weights[1] *= lse
    given = (q, k, v, spec, *weights)
    k, v, spec = dequantize(k, v, spec, jnp.dtype("float32"))
    exact = (*(x.astype(jnp.float32) for x in (q, k, v)), spec, *weights)
    with jax.default_matmul_precision("highest"):
        run = results(reference_attention, case.has_gradient)
        right = jax.jit(run)(*exact)
    return given, jax.tree.map(np.asarray, right)


def compare(ours: dict, right: dict) -> tuple[bool, dict, dict]:
    """Returns whether all is within bounds; errors overall, and of the worst row."""
    import numpy as np

    errors, rows, within = {}, {}, True
    for name, x in ours.items():
        if x is None:
            continue
        x, y = (np.asarray(a, np.float32) for a in (x, right[name]))
        if name == "lse":
            # An absolute error: it is a relative error of the probabilities.
            errors[name] = float(np.abs(x - y).max())
        else:
            errors[name] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
            length = np.linalg.norm(y, axis=-1)
            bound = np.maximum(length, np.sqrt(np.mean(length**2)))
            rows[name] = float(np.max(np.linalg.norm(x - y, axis=-1) / bound))
        # A NaN is not within anything.
        within &= errors[name] <= MAX_ERROR[name]
        within &= rows.get(name, 0) <= MAX_ROW_ERROR * MAX_ERROR[name]
    return bool(within), errors, rows


def check(case: Case, interpret: bool = False, wrong: Callable | None = None) -> dict:
    """Runs one case; returns its errors and whether it passed.

    Args:
      wrong: changes the spec that the implementation gets, to see that the gate fails.
    """
    import jax
    import numpy as np

    from jaxlm.ops.attention.dispatch import IMPLEMENTATIONS as FOUND
    from jaxlm.ops.attention.request import request

    name = case.implementation.partition(",")[0]
    q, k, _, spec = inputs(case)
    if not interpret:
        reason = FOUND[name].declines(request(q, k, spec, lse=name != "cudnn"))
        if reason is not None:
            return {"declined": reason}
    given, right = oracle(replace(case, implementation=""), name != "cudnn")
    if wrong is not None:
        given = (*given[:3], wrong(spec), *given[4:])
    segments = spec.mask.query_segments is not None
    attend = attention_of(case.implementation, q, segments, interpret)
    started = time.perf_counter()
    program = jax.jit(results(attend, case.has_gradient)).lower(*given).compile()
    seconds = time.perf_counter() - started
    ours, again = (jax.tree.map(np.asarray, program(*given)) for _ in range(2))
    within, errors, rows = compare(ours, right)
    same = all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(again), strict=True)
    )
    return {
        # cuDNN's gradients need not be the same twice.
        "passed": within and (same or name == "cudnn"),
        "same_twice": same,
        "errors": errors,
        "worst_rows": rows,
        "compile_s": round(seconds, 1),
    }


def work(interpret: bool) -> None:
    """Checks the cases that come in on standard input; writes a line for each."""
    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            found = check(case, interpret)
        except Exception as error:  # compilers and kernels raise no common class
            found = {"passed": False, "failure": f"{type(error).__name__}: {error}"}
            found["failure"] = found["failure"][:2000]
        print(json.dumps(found), flush=True)


class Worker:
    """A process that checks cases; replaced when one stalls or kills it."""

    def __init__(self, options: list[str]):
        self._command = [sys.executable, __file__, "--worker", *options]
        self._process: subprocess.Popen | None = None

    def check(self, case: Case) -> dict:
        if self._process is None:
            environment = {
                **os.environ,
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                # The reference need not be fast. Interpreted warpgroups wait for one
                # another, and each needs a thread of the host.
                "XLA_FLAGS": "--xla_gpu_autotune_level=0 "
                "--xla_force_host_platform_device_count=8",
            }
            self._process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._lines: queue.Queue[str] = queue.Queue()
            threading.Thread(
                target=self._read, args=(self._process, self._lines), daemon=True
            ).start()
        process = self._process
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(case)) + "\n")
        process.stdin.flush()
        try:
            line = self._lines.get(timeout=STALL_SECONDS)
        except queue.Empty:
            self.close()
            return {"passed": False, "failure": f"no result in {STALL_SECONDS} s"}
        if not line:
            code = process.wait()
            self.close()
            return {"passed": False, "failure": f"the process ended with {code}"}
        return json.loads(line)

    @staticmethod
    def _read(process: subprocess.Popen, lines: queue.Queue) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                if line.startswith("{"):
                    lines.put(line)
        lines.put("")

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            self._process = None


def check_all(found: list[Case], options: list[str], workers: int) -> Iterator:
    """Checks cases in several processes; yields (case, result) as they come.

    Cases that differ only in the implementation go to one process, which computes their
    oracle once.
    """
    groups: dict[Case, list[Case]] = {}
    for case in found:
        groups.setdefault(replace(case, implementation=""), []).append(case)
    todo: queue.SimpleQueue[list[Case]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Case, dict]] = queue.SimpleQueue()
    for group in groups.values():
        todo.put(group)

    def run() -> None:
        worker = Worker(options)
        while True:
            try:
                group = todo.get_nowait()
            except queue.Empty:
                break
            for case in group:
                done.put((case, worker.check(case)))
        worker.close()

    for _ in range(workers):
        threading.Thread(target=run, daemon=True).start()
    for _ in found:
        yield done.get()


def licensed(results: dict[str, dict[str, dict]]) -> list[str]:
    """Returns the implementations that ran and passed every case not declined."""
    return [
        name
        for name, cases in results.items()
        if all(r.get("passed", "declined" in r) for r in cases.values())
        and any("passed" in r for r in cases.values())
    ]


def described() -> dict[str, str]:
    """Returns the platform, kind and versions, asked in a process of its own.

    This one must not occupy the device.
    """
    program = (
        "import jax, json; d = jax.devices()[0]; print(json.dumps({'platform': "
        "d.platform, 'device': d.device_kind, 'jax': jax.__version__, 'runtime': "
        "d.client.platform_version}))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--interpret", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--no-timings", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.interpret is not None)
        return
    device = described()
    platform = options.interpret or device["platform"]
    if platform not in IMPLEMENTATIONS:
        raise SystemExit(
            "error: no accelerator found; --interpret gpu or tpu tests the gate itself"
        )
    flags, workers = [], WORKERS
    if options.interpret:
        flags, workers = ["--interpret", platform], 2
        device["device"] = f"interpreter of {platform} kernels"
    options.out.mkdir(parents=True, exist_ok=True)
    name = device["device"].replace(" ", "_")
    check_file = options.out / f"check_{name}.json"
    todo = cases(platform, bool(options.interpret))
    if options.interpret:
        # The stock kernels have no interpreter.
        todo = [case for case in todo if case.implementation.startswith("pallas")]
    found: dict[str, dict[str, dict]] = {}
    started = time.monotonic()
    for case, result in check_all(todo, flags, workers):
        label = f"head_dim {case.head_dim}: {case.option}"
        found.setdefault(case.implementation, {})[label] = result
        verdict = result.get("declined") or ("ok" if result["passed"] else "FAILED")
        seconds = round(time.monotonic() - started)
        details = json.dumps(result) if verdict == "FAILED" else ""
        print(f"[{seconds} s] {case}: {verdict} {details}", flush=True)
        passed = licensed(found) if sum(map(len, found.values())) == len(todo) else []
        # What is interpreted is never licensed.
        record = {
            **device,
            "licensed": [] if options.interpret else passed,
            "passed": passed,
            "seconds": seconds,
            "results": found,
        }
        check_file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"passed: {', '.join(passed) or 'none'} -> {check_file}")
    if not (options.interpret or options.no_timings):
        timings = options.out / f"attention_{name}.json"
        subprocess.run(
            [
                *(sys.executable, HERE / "attention.py", "--out", timings),
                *("--lengths", "1024", "8192", "--head-dims", "64", "128"),
                *("--rounds", "3", "--seconds", "0.05"),
            ],
            check=True,
        )


if __name__ == "__main__":
    main()
