"""What caches and weights in few bits lose: perplexities of one model, in float32.

python benchmarks/rounding.py PATH

PATH is a model as `sample.py` takes it. For the caches, the first windows of 512 tokens
of the bundled Shakespeare are read in chunks of 32, each of which attends to what the
cache holds of the chunks before. For the weights, `jaxlm eval --context 512` predicts
the text's first 16 kB. Writes benchmarks/results/rounding.json.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from train_step import machine

import jaxlm
from jaxlm.commands.process import use_compile_cache
from jaxlm.config import ModelConfig
from jaxlm.data.sources import BUNDLED_FOLDER
from jaxlm.evaluation.text_loss import text_loss
from jaxlm.model.initialization import init_cache
from jaxlm.model.transformer import forward
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

RESULTS = Path(__file__).parent / "results" / "rounding.json"
CONTEXT, CHUNK, WINDOWS, BYTES = 512, 32, 4, 16_384
CASES = ("cache full", "cache int8", "cache int4")
CASES += ("weights float", "weights int8", "weights int4")
TEXT = (BUNDLED_FOLDER / "shakespeare.txt").read_text(encoding="utf-8")


def perplexity_with_cache(
    config: ModelConfig, params: Params, tokens: jax.Array, kind: str
) -> float:
    """Reads windows [B, CONTEXT] in chunks through a cache of this kind."""

    @jax.jit
    def read(params, cache, chunk, targets):
        out = forward(config, params, chunk, cache=cache)
        logprobs = jax.nn.log_softmax(out.logits, axis=-1)
        found = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        return out.cache, jnp.where(targets < 0, 0.0, found).sum()

    cache, total = init_cache(config, len(tokens), CONTEXT, kind=kind), 0.0
    # The last token of a window has no next one.
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    for start in range(0, CONTEXT, CHUNK):
        part = slice(start, start + CHUNK)
        cache, logprobs = read(params, cache, tokens[:, part], targets[:, part])
        total += float(logprobs)
    return math.exp(-total / (len(tokens) * (CONTEXT - 1)))


def perplexity_with_weights(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, kind: str
) -> float:
    """Predicts the beginning of the text by matrices of this kind."""
    rounded = jaxlm.quantize_matrices(params, kind)
    *_, sums = text_loss(config, rounded, tokenizer, [TEXT[:BYTES]], context=CONTEXT)
    return sums.perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--case", choices=CASES, action="append")
    arguments = parser.parse_args()
    use_compile_cache()
    config, params = jaxlm.load(arguments.path)
    config = replace(config, dtype="float32")
    tokenizer = jaxlm.load_tokenizer(arguments.path)
    tokens = tokenizer.encode(TEXT[: 8 * WINDOWS * CONTEXT])[: WINDOWS * CONTEXT]
    windows = jnp.asarray(tokens).reshape(WINDOWS, CONTEXT)
    name = f"{Path(arguments.path).stem}, {machine()['processor']}"
    for case in arguments.case or CASES:
        what, kind = case.split()
        with jax.default_matmul_precision("highest"):
            if what == "cache":
                found = perplexity_with_cache(config, params, windows, kind)
            else:
                found = perplexity_with_weights(config, params, tokenizer, kind)
        print(f"{case:14} {found:8.2f}", flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        perplexities = results.get(name, {}).get("perplexity", {}) | {case: found}
        results[name] = {"perplexity": perplexities, "machine": machine()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
