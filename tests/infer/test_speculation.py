"""Speculative decoding writes the texts of plain decoding, and faster ones are refused.

Plain decoding is the oracle for tokens, the model's own probabilities for frequencies.
"""

import inspect
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats
from toy_case import make_params, toy

from jaxlm.config import RopeScaling, SampleConfig
from jaxlm.infer.check_arguments import check_speculation
from jaxlm.infer.generate import generate
from jaxlm.infer.rules.automata import FORBIDDEN, Automaton
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.speculative.proposals import DraftModel, PromptLookup
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap

# A ring of 38 tokens in a context of 100.
CONFIG = toy(layer_pattern=("local", "global"), window=6, context_length=100)
PARAMS = make_params(CONFIG, std=0.4)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 48, n).tolist() for n in (1, 5, 33, 8)] + [[7, 8, 9] * 11]
LETTERS = [bytes([97 + i % 26]) for i in range(48)]
SAMPLES = [
    # Its text ends with the context, and goes around the ring.
    SampleConfig(temperature=0.0, max_new_tokens=99),
    SampleConfig(max_new_tokens=9, top_k=5, stop_strings=("a", "zz")),
    SampleConfig(temperature=0.0, max_new_tokens=40, stop_ids=(3, 4)),
    SampleConfig(temperature=0.7, max_new_tokens=30, repetition_penalty=1.2, min_p=0.1),
    SampleConfig(temperature=0.3, max_new_tokens=50),
]
DRAFT = DraftModel(CONFIG, jax.tree.map(lambda x: 1.03 * x, PARAMS))


def run(**options):
    call = (CONFIG, PARAMS, PROMPTS, SAMPLES, 3)
    return generate(*call, token_bytes=LETTERS, top_logprobs=2, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, speculate", [("full", PromptLookup(min_ngram=1)), ("ring_int8", DRAFT)]
)
def test_texts_are_those_of_plain_decoding(kind, speculate):
    """Rows are ragged, greedy and sampled, and have rules and ends of all kinds.

    Two at a time; the test of conversations has all at once, in a ring.
    """
    plain = run(cache=kind, num_slots=2)
    ours = run(cache=kind, num_slots=2, speculate=speculate)
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    np.testing.assert_array_equal(ours.top_tokens, plain.top_tokens)
    for name in ("logprobs", "top_logprobs"):
        pair = (getattr(ours, name), getattr(plain, name))
        np.testing.assert_allclose(*pair, atol=3e-5, rtol=3e-5)
    assert (plain.num_proposed == 0).all()
    assert (ours.num_accepted <= ours.num_proposed).all()
    # Rows accept different numbers; the periodic one goes on as it was.
    assert len(set(ours.num_accepted.tolist())) > 2
    if isinstance(speculate, DraftModel):
        assert ours.num_accepted.sum() > 0.5 * ours.num_proposed.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_texts", [1024, pytest.param(100_000, marks=pytest.mark.nightly)]
)
def test_drawn_texts_have_the_probabilities_of_the_model(num_texts):
    """All texts of three tokens against the closed form, by chi-square.

    A draft model that thinks otherwise is right and wrong about equally often.
    """
    config = toy(vocab_size=4, num_layers=1, context_length=32)
    params, other = (make_params(config, seed, std=0.3) for seed in (0, 1))
    sample = SampleConfig(max_new_tokens=3, temperature=1.5)
    found = generate(
        *(config, params, [[1, 2]] * num_texts, sample, 7),
        num_slots=min(num_texts, 4096),
        speculate=DraftModel(config, other, 2),
    )
    rejected = 1 - found.num_accepted.sum() / (2 * num_texts)
    assert 0.1 < rejected < 0.9
    texts = np.array(list(itertools.product(range(4), repeat=3)))
    rows = np.concatenate([np.tile([1, 2], (len(texts), 1)), texts], axis=1)
    logits = jax.jit(lambda p, x: forward(config, p, x).logits)(params, rows)
    logits = logits[:, 1:-1] / sample.temperature
    logprobs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    chosen = np.take_along_axis(logprobs, texts[..., None], axis=2)
    probabilities = np.exp(chosen[..., 0].sum(axis=1))
    number = found.tokens @ np.array([16, 4, 1])
    counts = np.bincount(number, minlength=64)
    expected = num_texts * probabilities / probabilities.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_lookup_takes_the_newest_of_the_longest_matches():
    tokens = np.zeros((3, 12), np.int32)
    # 5 6 was followed by 1 and by 2; 4 5 6 by 1 only.
    tokens[0, :10] = [4, 5, 6, 1, 9, 5, 6, 2, 5, 6]
    tokens[1, :11] = [4, 5, 6, 1, 9, 5, 6, 2, 4, 5, 6]
    # A text of period 2 goes on with it; 8 alone is not enough.
    tokens[2, :5] = [3, 8, 7, 8, 7]
    history = History(tokens, np.array([10, 11, 5], np.int32), np.zeros(3, np.int32))
    history = jax.tree.map(jax.numpy.asarray, history)
    guesses = PromptLookup(4).propose(history)
    assert guesses.tolist() == [[2, 5, 6, 2], [1, 9, 5, 6], [8, 7, 8, 7]]
    history = replace(history, lengths=np.array([9, 5, 4], np.int32))
    assert PromptLookup(4).propose(history).tolist() == [[-1] * 4] * 3
    assert PromptLookup(2, 1, 1).propose(history).tolist()[2] == [7, 8]


@pytest.mark.slow
def test_grammars_edits_and_conversations_are_those_of_plain_decoding():
    """A later call goes on from a cache that holds rejected guesses."""
    pairs = np.full((2, 48), FORBIDDEN, np.int16)
    pairs[0, 4], pairs[0, 6], pairs[1, 5], pairs[0, 0] = 1, 1, 0, 0
    grammar = Automaton(pairs, np.array([0, 1], np.int16))
    sample = SampleConfig(max_new_tokens=20, stop_ids=(0,))
    edit = Edit("resid_post", "scale", 1.1, layer=0, position=[3, 12])
    call = (CONFIG, PARAMS, PROMPTS[:3], sample, 1)
    options = {
        "grammars": [grammar, None, grammar],
        "cache": "ring",
        "edits": (edit,),
        "return_state": True,
    }
    plain, ours = (
        generate(*call, **options, speculate=speculate)
        for speculate in (None, PromptLookup(min_ngram=1))
    )
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    assert ours.num_accepted.sum() > 0
    prompts = [[*p, *r, 2, 3] for p, r in zip(PROMPTS, plain.rows, strict=False)]
    again, more = (
        generate(*call[:2], prompts, sample, 2, cache="ring", resume=one.state)
        for one in (plain, ours)
    )
    assert (more.prefill_tokens <= 3).all()
    np.testing.assert_array_equal(more.tokens, again.tokens)


def test_what_cannot_speculate_is_refused_in_a_line():
    short = toy(context_length=50)
    dynamic = replace(CONFIG, rope_scaling=RopeScaling(kind="dynamic", factor=2.0))
    for config, options, message in (
        (
            CONFIG,
            {"speculate": PromptLookup(), "taps": (Tap("logits"),)},
            "leave out taps or speculate",
        ),
        (
            CONFIG,
            {"speculate": DraftModel(short, make_params(short))},
            "has a context of 50, and the cache has room for 100: take another",
        ),
        (dynamic, {"speculate": PromptLookup()}, "'dynamic' rotates by the length"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(
                config, PARAMS, [[1]], SAMPLES[1:2], token_bytes=LETTERS, **options
            )
    check = inspect.unwrap(check_speculation)
    for make, message in (
        (lambda: check("lookup", CONFIG, 9, ()), "speculate is a str: give PromptLoo"),
        (
            lambda: PromptLookup(33),
            "num_speculative_tokens is 33: it must be from 1 to",
        ),
        (lambda: PromptLookup(3, 1, 2), "min_ngram is 2 and max_ngram 1"),
        (lambda: DraftModel(CONFIG, PARAMS, 0), "num_speculative_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
