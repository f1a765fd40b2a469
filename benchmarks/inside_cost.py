"""Counts what looking inside costs a model of SmolLM2-135M's shape. Runs nothing.

python benchmarks/inside_cost.py

FLOPs, bytes accessed and temporaries as the compiler counts them, over those of the
same program without taps: of a pass over 512 tokens and of a decoding step with a cache
of 512. The loop over the layers is unrolled, since the compiler counts the body of a
loop once, however often it runs. And whether the optimised program without taps is the
same text as one whose sites are the identity. Writes
benchmarks/results/inside_cost.json.
"""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from train_step import machine

import jaxlm
from jaxlm.model import layer_stack, recording
from jaxlm.model.initialization import init_cache

LENGTH = 512
RESULTS = Path(__file__).parent / "results" / "inside_cost.json"
ONE_LAYER = "attn_probs", "head_out", "mlp_norm_div", "mlp_act", "resid_post", "z"


class NoProbe(recording.Probe):
    def __call__(self, site, x):
        return x


def main() -> None:
    config = jaxlm.preset("smollm2-135m")
    config = dataclasses.replace(
        config, dtype="float32", unroll_layers=config.num_layers
    )
    params = jax.eval_shape(partial(jaxlm.init, config), jax.random.key(0))
    text = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = jax.eval_shape(partial(init_cache, config, 1, LENGTH))

    def read(taps, params, tokens):
        out = jaxlm.forward(config, params, tokens, taps=taps)
        return out.logits, out.trace

    def decode(taps, params, cache, token):
        out = jaxlm.forward(config, params, token, cache=cache, taps=taps)
        return out.logits, out.cache, out.trace

    def compiled(*taps):
        return jax.jit(partial(read, taps)).lower(params, text).compile()

    def decoding(*taps):
        step = jax.jit(partial(decode, taps), donate_argnums=1)
        return step.lower(params, cache, token).compile()

    plain, plain_step = compiled(), decoding()
    without = (mock.patch.object(x, "Probe", NoProbe) for x in (layer_stack, recording))
    with next(without), next(without):
        bare = compiled()
    last = config.num_layers - 1
    some = (
        jaxlm.Tap("resid_post"),
        jaxlm.Tap("attn_probs", layers=(last,)),
        jaxlm.Tap("mlp_act", layers=(1,)),
    )
    result = {
        "machine": machine(),
        "same_text_without_taps": text_of(plain) == text_of(bare),
        "resid_post": over(plain, compiled(jaxlm.Tap("resid_post"))),
        "one_layer": {
            site: over(plain, compiled(jaxlm.Tap(site, layers=(last // 2,))))
            for site in ONE_LAYER
        },
        "decoding_with_taps": over(plain_step, decoding(*some)),
    }
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def over(plain, tapped) -> dict[str, float]:
    """Returns the figures of the second program over those of the first."""
    names = {"flops": "flops", "bytes": "bytes accessed"}
    ours, base = tapped.cost_analysis(), plain.cost_analysis()
    ratios = {name: round(ours[key] / base[key], 4) for name, key in names.items()}
    memory = [x.memory_analysis().temp_size_in_bytes for x in (tapped, plain)]
    return {**ratios, "temporaries": round(memory[0] / memory[1], 4)}


def text_of(program) -> str:
    """Returns the optimised program, without the lines of source that it names."""
    lines = re.sub(r", metadata=\{[^}]*\}", "", program.as_text()).splitlines()
    return "\n".join(line for line in lines if re.match(r"\s*(ROOT )?%|ENTRY", line))


if __name__ == "__main__":
    main()
