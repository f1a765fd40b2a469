"""How long a command that continues a text takes to its first token.

python benchmarks/first_token.py PATH [--rounds 5]

PATH is a model as `sample.py` takes it. Each round is a process of its own that does
what `sample.py` does: it imports jaxlm, loads the model, compiles and generates. From
the first process on, which is told apart, the compiled programs are in JAX's cache on
the disk. The last stage continues another text, for which nothing is compiled: what is
left of the first token is preparing the weights, reading the prompt, and one step.

Prints the medians of these stages, in seconds and in CPU seconds (beside other work,
only they count), and writes them to benchmarks/results/first_token.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from train_step import child, foreign_cores, machine

RESULTS = Path(__file__).parent / "results" / "first_token.json"


PROMPTS = ("The capital of France is", "In 1969, three people")


def stages(path: str) -> dict[str, dict[str, float]]:
    """Continues two texts in this process; returns the times of each stage."""
    last = time.perf_counter(), 0.0
    found = {}

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter(), time.process_time()
        found[stage] = {"s": now[0] - last[0], "cpu_s": now[1] - last[1]}
        last = now

    import jax

    from jaxlm.checkpoint.load import load, open_checkpoint
    from jaxlm.commands.process import use_compile_cache
    from jaxlm.config import SampleConfig
    from jaxlm.infer.generate import generate

    use_compile_cache()
    jax.devices()
    lap("imports")
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    config, params = load(checkpoint)
    jax.block_until_ready(params)
    lap("load")
    stages = ("compile, first token", "first token")
    for stage, prompt in zip(stages, PROMPTS, strict=True):

        def on_tokens(_new, _inside, stage=stage) -> bool:
            lap(stage)
            return True

        result = generate(
            *(config, params, [tokenizer.encode_prompt(prompt)]),
            SampleConfig(temperature=0.0, max_new_tokens=64),
            num_tokens=tokenizer.vocab_size,
            token_bytes=tokenizer.token_bytes,
            on_tokens=on_tokens,
        )
        assert (result.compile_s > 0) == (stage == stages[0])
        lap("rest")
    return {stage: times for stage, times in found.items() if stage != "rest"}


def medians(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Returns the medians over processes, by stage and unit."""
    return {
        stage: {
            unit: statistics.median(run[stage][unit] for run in runs)
            for unit in runs[0][stage]
        }
        for stage in runs[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--even-if-busy", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(stages(arguments.path)))
        return
    command = [sys.executable, __file__, arguments.path, "--child"]
    runs, loads = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds + 1):
            loads.append(foreign_cores())
            if loads[-1] > 0.2 and not arguments.even_if_busy:
                raise SystemExit(
                    f"other processes use {loads[-1]:.1f} cores: wait, or pass "
                    "--even-if-busy"
                )
            runs.append(child(command, XDG_CACHE_HOME=folder))
            print(f"process {number + 1} of {arguments.rounds + 1}", file=sys.stderr)
    cold, *warm = runs
    found = medians(warm)
    print(f"{'':24}{'seconds':>10}{'of CPU':>10}{'cold':>10}")
    for stage, values in found.items():
        numbers = values["s"], values["cpu_s"], cold[stage]["s"]
        print(f"{stage:24}{''.join(f'{x:10.2f}' for x in numbers)}")
    name = f"{Path(arguments.path).stem}, {machine()['processor']}"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {
        "median": found,
        "warm": warm,
        "cold": cold,
        "cores_used_by_others": loads,
        "machine": machine(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
