"""Compares the scores of texts with full forward passes, one text at a time."""

import inspect

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from toy_case import make_params, toy

from jaxlm import tree
from jaxlm.config import MeshConfig, SampleConfig
from jaxlm.infer import scoring
from jaxlm.infer.generate import generate
from jaxlm.infer.scoring import score
from jaxlm.model.transformer import forward
from jaxlm.sharding.mesh import make_mesh

CONFIG = toy()
PARAMS = make_params(CONFIG, std=0.5)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 40, n).tolist() for n in (1, 2, 31, 33, 96, 5, 64, 70)]


@pytest.fixture(scope="module")
def logits():
    tokens = np.zeros((len(TEXTS), 96), np.int32)
    for row, text in zip(tokens, TEXTS, strict=True):
        row[: len(text)] = text
    run = jax.jit(lambda params: forward(CONFIG, params, tokens).logits)
    return np.asarray(run(PARAMS), np.float64)


@pytest.mark.parametrize("num_tokens", [None, 40])
@pytest.mark.parametrize("held", [1024, 50], ids=["whole", "in chunks"])
def test_scores_are_those_of_a_full_forward_pass(monkeypatch, logits, num_tokens, held):
    monkeypatch.setattr(scoring, "LOGIT_TOKENS", held)
    monkeypatch.setattr(scoring, "PREFILL_TOKENS", 192)
    # What other sizes compiled must not be used here, nor this elsewhere.
    scoring._program.cache_clear()
    scores = score(CONFIG, PARAMS, TEXTS, num_tokens=num_tokens)
    scoring._program.cache_clear()
    for text, found, row in zip(TEXTS, scores, logits, strict=True):
        expected = log_softmax(row[: len(text) - 1, :num_tokens], axis=-1)
        expected = expected[np.arange(len(text) - 1), text[1:]]
        assert found.dtype == np.float32 and found.shape == (len(text) - 1,)
        # f32 sums over rows of other widths round differently; seen: 2e-5.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_scores_of_generated_tokens_are_the_log_probabilities_of_the_result():
    prompts = [TEXTS[2], TEXTS[5]]
    sample = SampleConfig(max_new_tokens=12, temperature=0.7, top_p=0.9)
    result = generate(CONFIG, PARAMS, prompts, sample, num_tokens=40)
    texts = [[*p, *new] for p, new in zip(prompts, result.tokens.tolist(), strict=True)]
    for i, found in enumerate(score(CONFIG, PARAMS, texts, num_tokens=40)):
        np.testing.assert_allclose(found[-12:], result.logprobs[i], atol=1e-5)


def test_one_text_on_a_mesh():
    """As the last row of what `jaxlm eval` reads; JAX 0.12 cannot roll it."""
    (alone,) = score(CONFIG, PARAMS, TEXTS[2:3])
    with jax.set_mesh(make_mesh(MeshConfig(data=1))):
        (found,) = score(CONFIG, PARAMS, TEXTS[2:3])
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)


def test_texts_of_other_lengths_compile_nothing(compilations):
    score(CONFIG, PARAMS, [[1] * 20] * 3)
    before = list(compilations)
    score(CONFIG, PARAMS, [[1] * 30, [2, 3], [4] * 17, [5]])
    assert compilations == before


@pytest.mark.parametrize(
    "texts, message",
    [
        ([[1] * 97], r"text 0 has 97 tokens, more than the model's context of 96: cut"),
        ([[1], []], r"prompt 1 is empty"),
        ("text", r"is a str, not a list of rows of token ids"),
        ([[48]], r"the id 48: ids are 0 to 47"),
    ],
)
def test_wrong_texts(texts, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(score)(CONFIG, PARAMS, texts)


def test_parameters_that_are_not_finite_are_refused():
    scale = np.full_like(PARAMS["final_norm"]["scale"], np.nan)
    params = tree.replace(PARAMS, "final_norm/scale", scale)
    with pytest.raises(ValueError, match=r"logits are not finite"):
        score(CONFIG, params, TEXTS[:2])
