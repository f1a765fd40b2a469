"""Compares prefill and decoding with transformers at the shape of SmolLM2-135M.

python benchmarks/decode.py --peer-python PATH [--rounds 3]

Alternates between jaxlm and transformers' `generate` in separate processes, `rounds`
times, and prints the medians in tokens per second and their ratio: greedy, random
weights, compiling not counted. PATH is a Python with torch and transformers. Results go
to benchmarks/results/decode.json. Run it on a quiet machine: the script stops if other
processes use more than a fifth of a core.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from train_step import child, foreign_cores, machine

from jaxlm.config import SampleConfig
from jaxlm.fields import to_dict
from jaxlm.model.presets import preset

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "decode.json"
MODEL = replace(preset("smollm2-135m"), context_length=2048)


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


def time_jaxlm(case: Case, dtype: str, repeats: int) -> dict:
    """Times `generate`, in this process."""
    import jax
    import numpy as np

    import jaxlm

    model = replace(MODEL, dtype=dtype)
    params = jaxlm.init(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.vocab_size, (case.batch, case.prompt))
    # The first new token costs a step here; that of transformers comes with the prompt.
    sample = SampleConfig(temperature=0.0, max_new_tokens=case.new)

    def run() -> jaxlm.Generation:
        return jaxlm.generate(model, params, prompts, sample)

    first, *results = [run() for _ in range(repeats + 1)]
    return {
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
    """Alternates between jaxlm and transformers."""
    case = CASES[name]
    runs: dict[str, list[dict]] = {"jaxlm": [], "transformers": []}
    same = ["--dtype", arguments.dtype, "--repeats", str(arguments.repeats)]
    ours = [sys.executable, __file__, "--child", name, *same]
    peer = [arguments.peer_python, str(HERE / "peer_decode.py"), *same]
    peer += ["--batch", str(case.batch), "--prompt", str(case.prompt)]
    peer += ["--new", str(case.new), "--model", json.dumps(to_dict(MODEL))]
    loads = []
    for number in range(arguments.rounds):
        loads.append(foreign_cores())
        if loads[-1] > 0.2 and not arguments.even_if_busy:
            raise SystemExit(
                f"other processes use {loads[-1]:.1f} cores: wait, or pass "
                "--even-if-busy"
            )
        runs["jaxlm"].append(child(ours))
        runs["transformers"].append(child(peer))
        print(f"{name}: round {number + 1} of {arguments.rounds}", file=sys.stderr)
    rates = {s: [rate(case, run) for run in found] for s, found in runs.items()}
    median = {system: statistics.median(values) for system, values in rates.items()}
    return {
        "batch": case.batch,
        "prompt": case.prompt,
        "new": case.new,
        "dtype": arguments.dtype,
        "tokens_per_s": rates,
        "median_tokens_per_s": median,
        "ratio": median["jaxlm"] / median["transformers"],
        "compile_s": runs["jaxlm"][0]["compile_s"],
        "cores_used_by_others": loads,
        "versions": {s: found[0]["version"] for s, found in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="Python with torch and transformers")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--even-if-busy", action="store_true")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case = CASES[arguments.child]
        print(json.dumps(time_jaxlm(case, arguments.dtype, arguments.repeats)))
        return
    if arguments.peer_python is None:
        parser.error("--peer-python is needed: a Python with torch and transformers")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    results["machine"] = machine()
    for name in arguments.case or list(CASES):
        result = compare(name, arguments)
        results["cases"][f"{name} {arguments.dtype}"] = result
        print(f"{name} ({result['dtype']})")
        for system, value in result["median_tokens_per_s"].items():
            print(f"  {system:14} {value:9.1f} tokens/s")
        print(f"  ratio {result['ratio']:.2f}")
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
