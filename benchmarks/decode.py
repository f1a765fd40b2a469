"""Compares prefill and decoding with peers at the shape of a published model.

python benchmarks/decode.py --peer-python PATH [--gguf FILE] [--model smollm2-135m]

Alternates between jaxlm and its peers in separate processes, `--rounds` times, and
prints the medians in tokens per second and the ratios: greedy, compiling not counted.
PATH is a Python with torch and transformers, whose `generate` has random weights, as
jaxlm has, and on a GPU a static cache and a compiled forward pass. FILE is a model of
the same shape: llama.cpp's server (package xllamacpp) reads it in `--dtype`, and gets
as many requests at once as the batch has rows. On an accelerator the share of the
bandwidth limit is told too: the time in which the device copies as many bytes as it
must read for a token, weights and keys and values, over the time of a step.

Results go to benchmarks/results/decode.json, or decode_DEVICE.json of an accelerator.
Run it on a quiet machine: the script stops if other processes use more than a fifth of
a core.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from train_step import child, foreign_cores, machine

from jaxlm.checkpoint.conversion import convert
from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.fields import to_dict
from jaxlm.model.params import count_matmul_params
from jaxlm.model.presets import preset
from jaxlm.ops.linear import compute_dtype

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def model_of(name: str) -> ModelConfig:
    """Returns the shape of a preset, with a context that fits all cases."""
    return replace(preset(name), context_length=2048)


@dataclass(frozen=True)
class Case:
    """Sizes of a call of `generate`."""

    batch: int
    prompt: int
    """Tokens of each prompt."""
    new: int
    """New tokens of each row; with 1, the rate is that of the prompt."""


CASES = {
    "batch-1": Case(1, 32, 64),
    "batch-8": Case(8, 32, 64),
    "prefill-512": Case(1, 512, 1),
}


def copied_per_second() -> float:
    """Measures the bytes that this device reads and writes in a second, in a copy."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2**30,), jnp.bfloat16)
    negate = jax.jit(jnp.negative).lower(x).compile()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([negate(x) for _ in range(10)])
        times.append((time.perf_counter() - start) / 10)
    return 2 * x.nbytes / min(times)


def bytes_of_step(case: Case, config: ModelConfig) -> float:
    """Returns the bytes of weights, and of keys and values in the middle of a text."""
    keys = case.batch * (case.prompt + case.new / 2) * config.num_kv_heads
    numbers = count_matmul_params(config)
    numbers += 2 * config.num_layers * keys * config.head_dim
    return numbers * compute_dtype(config.dtype).itemsize


def time_jaxlm(case: Case, model: ModelConfig, repeats: int) -> dict:
    """Times `generate`, in this process."""
    import jax
    import numpy as np

    import jaxlm

    params = jaxlm.init(model, jax.random.key(0))
    # As transformers is given them, and as files hold them.
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.vocab_size, (case.batch, case.prompt))
    # The first new token costs a step here; that of transformers comes with the prompt.
    sample = SampleConfig(temperature=0.0, max_new_tokens=case.new)

    def run() -> jaxlm.Generation:
        return jaxlm.generate(model, params, prompts, sample)

    first, *results = [run() for _ in range(repeats + 1)]
    device = jax.devices()[0]
    limit_s = None
    if device.platform != "cpu" and case.new > 1:
        limit_s = case.new * bytes_of_step(case, model) / copied_per_second()
    return {
        "device": device.device_kind,
        "limit_s": limit_s,
        "prefill_s": [result.prefill_s for result in results],
        "decode_s": [result.decode_s for result in results],
        "compile_s": first.compile_s,
        "version": jax.__version__,
    }


def rate(case: Case, run: dict) -> float:
    """Tokens per second of one process: of the prompt, or of decoding."""
    if case.new == 1:
        return case.batch * case.prompt / statistics.median(run["prefill_s"])
    return case.batch * case.new / statistics.median(run["decode_s"])


def compare(name: str, arguments: argparse.Namespace) -> dict:
    """Alternates between jaxlm and its peers."""
    case, model = CASES[name], model_of(arguments.model)
    same = ["--dtype", arguments.dtype, "--repeats", str(arguments.repeats)]
    ours = [sys.executable, __file__, "--child", name, "--model", arguments.model]
    ours += same
    sizes = ["--batch", str(case.batch), "--prompt", str(case.prompt)]
    sizes += ["--new", str(case.new), "--repeats", str(arguments.repeats)]
    commands = {"jaxlm": ours}
    if arguments.peer_python is not None:
        peer = [arguments.peer_python, str(HERE / "peer_decode.py"), *sizes]
        peer += ["--dtype", arguments.dtype, "--model", json.dumps(to_dict(model))]
        commands["transformers"] = peer
    if arguments.gguf is not None:
        peer = [sys.executable, str(HERE / "peer_llama.py"), *sizes]
        commands["llama.cpp"] = [*peer, "--model", str(arguments.gguf)]
    runs: dict[str, list[dict]] = {system: [] for system in commands}
    loads = []
    for number in range(arguments.rounds):
        loads.append(foreign_cores())
        if loads[-1] > 0.2 and not arguments.even_if_busy:
            raise SystemExit(
                f"other processes use {loads[-1]:.1f} cores: wait, or pass "
                "--even-if-busy"
            )
        for system, command in commands.items():
            runs[system].append(child(command))
        print(f"{name}: round {number + 1} of {arguments.rounds}", file=sys.stderr)
    rates = {s: [rate(case, run) for run in found] for s, found in runs.items()}
    median = {system: statistics.median(values) for system, values in rates.items()}
    first = runs["jaxlm"][0]
    share = None
    if first["limit_s"] is not None:
        share = max(run["limit_s"] / min(run["decode_s"]) for run in runs["jaxlm"])
    return {
        "device": first["device"],
        "model": arguments.model,
        "batch": case.batch,
        "prompt": case.prompt,
        "new": case.new,
        "dtype": arguments.dtype,
        "share_of_bandwidth_limit": share,
        "tokens_per_s": rates,
        "median_tokens_per_s": median,
        "ratios": {s: median["jaxlm"] / median[s] for s in list(median)[1:]},
        "compile_s": first["compile_s"],
        "cores_used_by_others": loads,
        "versions": {s: found[0]["version"] for s, found in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="Python with torch and transformers")
    parser.add_argument("--gguf", help="a GGUF file of the model, for llama.cpp")
    parser.add_argument("--model", default="smollm2-135m", help="a preset")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--even-if-busy", action="store_true")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, model = CASES[arguments.child], model_of(arguments.model)
        model = replace(model, dtype=arguments.dtype)
        print(json.dumps(time_jaxlm(case, model, arguments.repeats)))
        return
    if arguments.peer_python is None and arguments.gguf is None:
        parser.error("a peer is needed: --peer-python, --gguf or both")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.gguf is not None:
            kinds = {"float32": "f32", "bfloat16": "bf16"}
            gguf = Path(folder) / "model.gguf"
            convert(arguments.gguf, gguf, dtype=kinds[arguments.dtype])
            arguments.gguf = gguf
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measures the cases, prints what was found and writes it down."""
    for name in arguments.case or list(CASES):
        result = compare(name, arguments)
        print(f"{arguments.model}, {name} ({result['dtype']})")
        for system, value in result["median_tokens_per_s"].items():
            print(f"  {system:14} {value:9.1f} tokens/s")
        for system, ratio in result["ratios"].items():
            print(f"  {ratio:.2f} of {system}")
        if result["share_of_bandwidth_limit"] is not None:
            print(f"  {result['share_of_bandwidth_limit']:.0%} of the bandwidth limit")
        kind = "" if result["device"] == "cpu" else f"_{result['device']}"
        out = RESULTS / f"decode{kind.replace(' ', '_')}.json"
        found = json.loads(out.read_text()) if out.exists() else {"cases": {}}
        case = arguments.model, name, arguments.dtype, machine()["processor"]
        found["cases"][", ".join(case)] = result | {"machine": machine()}
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(out)


if __name__ == "__main__":
    main()
