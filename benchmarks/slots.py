"""Compares slots with fixed batches, and the kinds of cache, over uneven prompts.

python benchmarks/slots.py [--prompts 1000] [--slots 16] [--caches ring int8 int4]

A small model with random weights continues prompts of 8 to 200 tokens by 4 to 200 new
ones (most few), greedy, once with `generate(num_slots=...)` and once in batches of as
many prompts, each of which ends with its longest text; then in slots with other kinds
of cache. Everything is compiled before. `cpu_s` are the seconds of all cores, which
hardly depend on what else runs. Results go to benchmarks/results/slots.json.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from train_step import machine

import jaxlm
from jaxlm.terminal.progress import progress_bar

RESULTS = Path(__file__).parent / "results" / "slots.json"
MODEL = jaxlm.ModelConfig(
    vocab_size=8192,
    num_layers=6,
    model_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    hidden_dim=768,
    context_length=512,
    layer_pattern=("local", "local", "global"),
    window=64,
    dtype="float32",
)


def uneven(num_prompts: int) -> tuple[list[np.ndarray], list[jaxlm.SampleConfig]]:
    """Returns prompts and how many tokens each is continued by."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 201, num_prompts)
    new = np.clip(rng.geometric(1 / 40, num_prompts), 4, 200)
    prompts = [rng.integers(0, MODEL.vocab_size, n) for n in lengths]
    samples = [jaxlm.SampleConfig(temperature=0.0, max_new_tokens=int(n)) for n in new]
    return prompts, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--caches", nargs="*", default=[])
    arguments = parser.parse_args()
    params = jaxlm.init(MODEL, jax.random.key(0))
    prompts, samples = uneven(arguments.prompts)
    size = arguments.slots

    def in_slots(**options) -> list[jaxlm.Generation]:
        call = (MODEL, params, prompts, samples, 0)
        return [jaxlm.generate(*call, num_slots=size, **options)]

    def in_batches() -> list[jaxlm.Generation]:
        found = []
        with progress_bar("in fixed batches", len(prompts), "texts") as show:
            for i in range(0, len(prompts), size):
                part = slice(i, i + size)
                found.append(
                    jaxlm.generate(MODEL, params, prompts[part], samples[part], 0)
                )
                show(min(i + size, len(prompts)))
        return found

    results = {"machine": machine(), "prompts": len(prompts), "slots": size}
    tokens = {}
    cases = {"slots": in_slots, "fixed batches": in_batches}
    for kind in arguments.caches:
        cases[f"slots, {kind}"] = partial(in_slots, cache=kind)
    for name, run in cases.items():
        run()  # compiles what batches of each size need
        began, cpu_began = time.perf_counter(), time.process_time()
        found = run()
        seconds = time.perf_counter() - began
        cpu_s = time.process_time() - cpu_began
        tokens[name] = np.concatenate([row for x in found for row in x.rows])
        results[name] = {
            "seconds": seconds,
            "cpu_s": cpu_s,
            "tokens_per_s": len(tokens[name]) / seconds,
            "compile_s": sum(x.compile_s for x in found),
            "prefill_s": sum(x.prefill_s for x in found),
            "decode_s": sum(x.decode_s for x in found),
            "cache_bytes": max(x.cache_bytes for x in found),
            "same_tokens": float((tokens[name] == tokens["slots"]).mean()),
        }
        print(name, json.dumps(results[name]), flush=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
