"""Generation that goes on from a state equals generation from the start."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.config import RopeScaling, SampleConfig
from jaxlm.infer.generate import generate
from jaxlm.infer.prefill import bucket

NEW = 10
GREEDY = SampleConfig(temperature=0.0, max_new_tokens=NEW)
KEY = jax.random.key(7)
DYNAMIC = RopeScaling(kind="dynamic", factor=2.0, original_context_length=48)
MODELS = {
    "window": toy(layer_pattern=("local", "global"), window=6),
    "learned": toy(num_layers=1, position="learned"),
    "dynamic": toy(num_layers=1, rope_scaling=DYNAMIC),
}
RNG = np.random.default_rng(0)
FIRST, SECOND = ([RNG.integers(0, 48, n).tolist() for n in (1, 7, 20)] for _ in "12")


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """So that short texts outgrow their cache."""
    monkeypatch.setattr("jaxlm.infer.generate.capacity", bucket)


class Resumed:
    """Answers each batch of prompts twice: from the last state, and from the start."""

    def __init__(self, model):
        self.config = MODELS[model]
        self.params = make_params(self.config, std=0.5)
        self.state = None

    def answer(self, prompts, sample=GREEDY):
        call = (self.config, self.params, prompts, sample, KEY)
        fresh = generate(*call, return_state=True)
        resumed = generate(*call, resume=self.state, return_state=True)
        np.testing.assert_array_equal(resumed.tokens, fresh.tokens)
        np.testing.assert_array_equal(resumed.lengths, fresh.lengths)
        # f32 sums over caches of other lengths round differently; seen: 2e-6.
        np.testing.assert_allclose(resumed.logprobs, fresh.logprobs, atol=1e-5)
        length = min(len(p) for p in prompts) + NEW
        for ours, theirs in zip(
            *map(
                jax.tree.leaves, (resumed.state.cache.layers, fresh.state.cache.layers)
            ),
            strict=True,
        ):
            np.testing.assert_allclose(ours[:, :length], theirs[:, :length], atol=1e-5)
        self.state = resumed.state
        return resumed


def after(prompts, result, new):
    return [
        [*prompt, *tokens.tolist(), *more]
        for prompt, tokens, more in zip(prompts, result.tokens, new, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_conversation_prefills_only_what_is_new(model):
    conversation = Resumed(model)
    first = conversation.answer(FIRST)
    assert first.prefill_tokens.tolist() == [1, 7, 20]
    # The cache of the first call, of 32 tokens, has no room for the second.
    prompts = after(FIRST, first, SECOND)
    second = conversation.answer(prompts)
    # Rotations of the longest row depend on its length now, and 64 tokens are computed
    # at once.
    new = [12, 24, 50] if model == "dynamic" else [1, 7, 20]
    assert second.prefill_tokens.tolist() == new
    # The same again, from a cache that is longer than the prompt. 32 tokens are computed
    # at once, and 64 - 32 of the last row stay before them.
    again = conversation.answer(prompts)
    new = [12, 24, 50] if model == "dynamic" else [1, 1, 18]
    assert again.prefill_tokens.tolist() == new
    # Another message from the middle of the first answer on.
    edited = [p[: len(f) + 4] for p, f in zip(prompts, FIRST, strict=True)]
    edited = [[*p[:-1], (p[-1] + 1) % 48, 3, 5] for p in edited]
    new = [3, 3, 26] if model == "dynamic" else [3, 3, 3]
    assert conversation.answer(edited).prefill_tokens.tolist() == new
    # Nothing in common.
    other = [[t + 1 for t in p] for p in FIRST]
    assert conversation.answer(other).prefill_tokens.tolist() == [1, 7, 20]


@pytest.mark.slow
def test_the_end_of_the_context():
    """Padding and the steps of the last chunk would go beyond the cache."""
    conversation = Resumed("window")
    prompt = RNG.integers(0, 48, 86).tolist()
    first = conversation.answer([prompt])
    full = [*prompt, *first.tokens[0, :-1].tolist()]
    assert len(full) == conversation.config.context_length - 1
    last = conversation.answer([full], SampleConfig(temperature=0.0, max_new_tokens=1))
    assert last.tokens[0, 0] == first.tokens[0, -1]
    # 31 of these are in the cache, but 32 have to be computed at once.
    assert last.prefill_tokens.tolist() == [31]
    assert conversation.answer([full[:60]]).prefill_tokens.tolist() == [1]


@pytest.mark.slow
def test_texts_of_other_lengths_compile_nothing(compilations):
    config = toy(num_layers=1, context_length=32)
    params = make_params(config)
    state = None
    counts = []
    for prompts in (FIRST, SECOND, [[1, 2]] * 3, [[1, 2, 3, 4]] * 3):
        result = generate(
            *(config, params, prompts, GREEDY, KEY), resume=state, return_state=True
        )
        state = result.state
        counts.append(len(compilations))
    assert counts[0] > 0 and counts == counts[:1] * 4


@pytest.mark.slow
def test_a_state_is_used_once_by_the_same_model():
    config = MODELS["window"]
    params = make_params(config)
    call = (config, params, FIRST, GREEDY, KEY)
    assert generate(*call).state is None
    state = generate(*call, return_state=True).state
    with pytest.raises(ValueError, match="state has 3 rows, and there are 2 prompts"):
        generate(config, params, FIRST[:2], GREEDY, KEY, resume=state)
    other = (
        "resume: this state belongs to another config, other params or another block"
    )
    for model in ((toy(context_length=32), params), (config, make_params(config))):
        with pytest.raises(ValueError, match=other):
            generate(*model, FIRST, GREEDY, KEY, resume=state)
    # Neither of them took it.
    for longer in (False, True):
        state = generate(*call, return_state=True).state
        sample = replace(GREEDY, max_new_tokens=40 if longer else 2)
        generate(config, params, FIRST, sample, KEY, resume=state)
        with pytest.raises(
            ValueError, match="this state was used before, and a state "
        ):
            generate(*call, resume=state)
