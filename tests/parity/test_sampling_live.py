"""Compares the sampling rules with transformers' logits processors, where it has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import SampleConfig
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.sampling import filtered, penalized

pytestmark = pytest.mark.parity

B, V, S = 64, 300, 24
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (B, V)).astype(np.float32)
# Few different tokens, so that runs of them are repeated.
TEXT = RNG.integers(0, 6, (B, S)).astype(np.int32)
PROMPT = 10


@jax.jit
def ours(settings):
    lengths = jnp.full(B, S)
    history = History(jnp.asarray(TEXT), lengths, jnp.full(B, PROMPT))
    keys = jax.random.split(jax.random.key(0), B)
    return filtered(penalized(jnp.asarray(LOGITS), settings, history), keys, settings)


def theirs(names):
    import torch
    from transformers.generation import logits_process

    logits, text = torch.from_numpy(LOGITS), torch.from_numpy(TEXT.astype(np.int64))
    for name, *arguments in names:
        logits = getattr(logits_process, name)(*arguments)(text, logits)
    return logits.numpy()


RULES = {
    "temperature": ({"temperature": 0.7}, [("TemperatureLogitsWarper", 0.7)]),
    "top_k": ({"top_k": 7}, [("TopKLogitsWarper", 7)]),
    "top_p": ({"top_p": 0.8}, [("TopPLogitsWarper", 0.8)]),
    "min_p": ({"min_p": 0.05}, [("MinPLogitsWarper", 0.05)]),
    "typical": ({"typical_p": 0.7}, [("TypicalLogitsWarper", 0.7)]),
    "repetition": (
        {"repetition_penalty": 1.7},
        [("RepetitionPenaltyLogitsProcessor", 1.7)],
    ),
    "bigrams": ({"no_repeat_ngram": 2}, [("NoRepeatNGramLogitsProcessor", 2)]),
    "trigrams": ({"no_repeat_ngram": 3}, [("NoRepeatNGramLogitsProcessor", 3)]),
    "bias": (
        {"bias_ids": (3, 5), "biases": (2.0, -1.0)},
        [("SequenceBiasLogitsProcessor", [[[3], 2.0], [[5], -1.0]])],
    ),
    "forbidden": (
        {"forbidden_ids": (2, 9)},
        [("SuppressTokensLogitsProcessor", [2, 9])],
    ),
    "minimum": (
        {"min_new_tokens": 15, "stop_ids": (1, 4)},
        [("MinNewTokensLengthLogitsProcessor", PROMPT, 15, [1, 4])],
    ),
    "reached": (
        {"min_new_tokens": 14, "stop_ids": (1, 4)},
        [("MinNewTokensLengthLogitsProcessor", PROMPT, 14, [1, 4])],
    ),
    # In the order of transformers' `generate`.
    "composed": (
        {
            **{"bias_ids": (3, 5), "biases": (2.0, -1.0), "repetition_penalty": 1.3},
            **{"no_repeat_ngram": 2, "temperature": 1.4, "top_k": 60, "top_p": 0.9},
            **{"min_p": 0.01, "typical_p": 0.95},
        },
        [
            ("SequenceBiasLogitsProcessor", [[[3], 2.0], [[5], -1.0]]),
            ("RepetitionPenaltyLogitsProcessor", 1.3),
            ("NoRepeatNGramLogitsProcessor", 2),
            ("TemperatureLogitsWarper", 1.4),
            ("TopKLogitsWarper", 60),
            ("TopPLogitsWarper", 0.9),
            ("MinPLogitsWarper", 0.01),
            ("TypicalLogitsWarper", 0.95),
        ],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_logits_are_those_of_transformers(rule):
    fields, names = RULES[rule]
    settings = row_settings([SampleConfig(**fields)] * B, V)
    found, wanted = np.asarray(ours(jax.tree.map(jnp.asarray, settings))), theirs(names)
    dropped = wanted < NEVER / 2
    np.testing.assert_array_equal(found < NEVER / 2, dropped)
    np.testing.assert_allclose(found[~dropped], wanted[~dropped], rtol=1e-5, atol=1e-5)
    assert dropped.any() or (wanted != LOGITS).any() or rule == "reached"
