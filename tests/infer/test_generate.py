"""Compares generation with a plain loop of full forward passes, row by row."""

import dataclasses
import inspect
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm import tree
from jaxlm.config import MeshConfig, SampleConfig
from jaxlm.infer import prefill
from jaxlm.infer.decoding.decode_programs import advance
from jaxlm.infer.decoding.decoding_spec import DecodingSpec
from jaxlm.infer.generate import generate
from jaxlm.infer.prefill import bucket, capacity
from jaxlm.infer.slots import engine
from jaxlm.model.params import parameter_shardings
from jaxlm.model.transformer import forward
from jaxlm.ops import linear
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.types import OutputsFirst

CONFIG = toy()
PARAMS = make_params(CONFIG, std=0.5)
NEW = 20
GREEDY = SampleConfig(temperature=0.0, max_new_tokens=NEW)
DRAWN = SampleConfig(temperature=1.0, max_new_tokens=NEW)
KEY = jax.random.key(7)
RAGGED = [
    np.random.default_rng(n).integers(0, CONFIG.vocab_size, n).tolist()
    for n in (1, 7, 32)
]
LENGTH = 96
# Of one layer: caches of 512 tokens.
LONG = toy(num_layers=1, context_length=600)
LONG_PARAMS = make_params(LONG)


@jax.jit
def all_logprobs(params, tokens):
    """Logits [B, LENGTH, V] of one full forward pass without a cache."""
    logits = forward(CONFIG, params, tokens).logits
    return jax.nn.log_softmax(logits, axis=-1)


def logprobs_of(rows):
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    for row, text in zip(tokens, rows, strict=True):
        row[: len(text)] = text
    return np.asarray(all_logprobs(PARAMS, tokens))


def naive_greedy(prompts, new):
    """Appends the most likely token, with one full forward pass per token."""
    rows = [list(p) for p in prompts]
    for _ in range(new):
        probs = logprobs_of(rows)
        for i, row in enumerate(rows):
            row.append(int(probs[i, len(row) - 1].argmax()))
    return np.array([r[len(p) :] for r, p in zip(rows, prompts, strict=True)])


@pytest.fixture(scope="module")
def greedy():
    return generate(CONFIG, PARAMS, RAGGED, GREEDY, KEY)


@pytest.fixture(scope="module")
def drawn():
    return generate(CONFIG, PARAMS, RAGGED, DRAWN, KEY)


def test_greedy_tokens_are_those_of_a_naive_loop(greedy):
    naive = naive_greedy(RAGGED, NEW)
    assert greedy.tokens.dtype == np.int32 and greedy.tokens.shape == (3, NEW)
    np.testing.assert_array_equal(greedy.tokens, naive)
    assert greedy.lengths.tolist() == [NEW] * 3
    # A text that repeats one token would prove little.
    assert len(np.unique(naive)) > 5
    # Changing one weight in one layer changes the text.
    q = PARAMS["layers"]["attn"]["q"].copy()
    q[0, 0, 0, 0] += 1.0
    other = tree.replace(PARAMS, "layers/attn/q", q)
    changed = generate(CONFIG, other, RAGGED, GREEDY, KEY)
    assert (changed.tokens != naive).any()


@pytest.mark.parametrize("which", ["greedy", "drawn"])
def test_logprobs_are_those_of_a_full_forward_pass(which, request):
    result = request.getfixturevalue(which)
    rows = [p + t.tolist() for p, t in zip(RAGGED, result.tokens, strict=True)]
    full = logprobs_of(rows)
    for i, prompt in enumerate(RAGGED):
        places = len(prompt) - 1 + np.arange(NEW)
        expected = full[i, places, result.tokens[i]]
        # f32 sums over cached and over fresh keys round differently; seen: 1e-6.
        np.testing.assert_allclose(result.logprobs[i], expected, atol=1e-5)


@pytest.mark.slow
def test_a_row_is_what_its_prompt_gives_alone(greedy, drawn):
    for sample, batch in ((GREEDY, greedy), (DRAWN, drawn)):
        # The first row's key does not depend on the size of the batch.
        alone = generate(CONFIG, PARAMS, RAGGED[:1], sample, KEY)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[0])
        np.testing.assert_allclose(alone.logprobs[0], batch.logprobs[0], atol=1e-5)
        for row, prompt in enumerate(RAGGED):
            # Other rows beside it, the last of which also changes the batch's width.
            mates = [prompt if i == row else RAGGED[0] for i in range(3)]
            same = generate(CONFIG, PARAMS, mates, sample, KEY)
            np.testing.assert_array_equal(same.tokens[row], batch.tokens[row])
    assert (drawn.tokens != greedy.tokens).any()


@pytest.mark.slow
def test_one_row_on_a_gpu_reads_matrices_with_their_outputs_first(greedy, monkeypatch):
    monkeypatch.setattr(linear, "target", lambda: ("gpu", "a card"))
    alone = generate(CONFIG, PARAMS, RAGGED[1:2], GREEDY, KEY, return_state=True)
    assert alone.tokens.tolist() == greedy.tokens[1:2].tolist()
    np.testing.assert_allclose(alone.logprobs, greedy.logprobs[1:2], atol=1e-5)
    heads = CONFIG.num_heads + 2 * CONFIG.num_kv_heads
    split = alone.state.split_params["layers"][0]["attn"]["q"]
    assert split.values.shape == (heads * CONFIG.head_dim, CONFIG.model_dim)

    # On a mesh of one device, as commands have it.
    rows, one_row = [], linear._one_row
    monkeypatch.setattr(linear, "_one_row", lambda *a: rows.append(a) or one_row(*a))
    with jax.set_mesh(make_mesh_of_size(MeshConfig(data=1))):
        meshed = generate(CONFIG, PARAMS, RAGGED[1:2], GREEDY, KEY)
    assert rows
    assert meshed.tokens.tolist() == greedy.tokens[1:2].tolist()
    np.testing.assert_allclose(meshed.logprobs, greedy.logprobs[1:2], atol=1e-5)


@pytest.mark.slow
def test_few_bfloat16_rows_on_a_cpu_read_matrices_with_their_outputs_first(monkeypatch):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    native = linear.compute_dtype("auto") == jnp.bfloat16

    def read(flags, params=PARAMS):
        monkeypatch.setattr(linear, "_cpu_flags", lambda: frozenset(flags))
        drawn = generate(config, params, RAGGED, GREEDY, KEY, return_state=True)
        matrix = drawn.state.split_params["layers"][0]["attn"]["q"]
        return drawn, isinstance(matrix, OutputsFirst)

    plain, turned = read([])
    assert not turned
    drawn, turned = read(["amx_bf16"])
    assert turned
    mesh = make_mesh_of_size(MeshConfig(data=1))  # as commands have it
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, parameter_shardings(PARAMS, mesh))
        meshed, turned = read(["amx_bf16"], params)
        assert turned
        state = meshed.state
        spec = DecodingSpec(config, state.max_length).for_rows(3)
        step = jax.jit(partial(advance, spec))
        tokens = np.zeros(3, np.int32)
        step = step.lower(state.split_params, state.cache, tokens, ((), ()))
        text = step.compile().as_text()
    # No matrix is written in f32.
    matrices = {x.size for x in jax.tree.leaves(state.split_params) if x.ndim > 1}
    shapes = re.findall(r"= f32\[([\d,]+)\]", text)
    written = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert shapes and not (native and written & matrices)
    for found in (drawn, meshed):
        # Sums of another order change the last of 8 bits now and then.
        np.testing.assert_allclose(
            found.logprobs[:, :4], plain.logprobs[:, :4], atol=0.05
        )


def test_a_longer_neighbour_changes_nothing(greedy, drawn):
    """A prompt of 40 tokens moves the batch into the next bucket."""
    long = np.arange(40) % CONFIG.vocab_size
    for sample, batch in ((GREEDY, greedy), (DRAWN, drawn)):
        wide = generate(CONFIG, PARAMS, [*RAGGED[:2], long.tolist()], sample, KEY)
        np.testing.assert_array_equal(wide.tokens[:2], batch.tokens[:2])
        np.testing.assert_allclose(wide.logprobs[:2], batch.logprobs[:2], atol=1e-5)


def test_rows_of_one_prompt_and_other_keys_differ(drawn):
    same = generate(CONFIG, PARAMS, [RAGGED[1]] * 3, DRAWN, KEY)
    assert len({row.tobytes() for row in same.tokens}) == 3
    again = generate(CONFIG, PARAMS, RAGGED, DRAWN, KEY)
    np.testing.assert_array_equal(again.tokens, drawn.tokens)
    other = generate(CONFIG, PARAMS, RAGGED, DRAWN, jax.random.key(8))
    assert (other.tokens != drawn.tokens).any(axis=1).all()


def test_stop_tokens_end_a_row_and_are_not_part_of_it(greedy):
    stops = (int(greedy.tokens[0, 4]), int(greedy.tokens[1, 9]))
    sample = SampleConfig(temperature=0.0, max_new_tokens=NEW, stop_ids=stops)
    result = generate(CONFIG, PARAMS, RAGGED, sample, KEY)
    for row, full in zip(range(3), greedy.tokens.tolist(), strict=True):
        ends = [i for i, token in enumerate(full) if token in stops] or [NEW]
        end = ends[0]
        assert result.lengths[row] == end
        assert result.tokens[row].tolist() == full[:end] + [0] * (NEW - end)
        assert (result.logprobs[row, :end] != 0).all()
        assert (result.logprobs[row, end:] == 0).all()
    assert result.lengths[0] <= 4 and result.lengths[1] <= 9


def test_the_mean_of_the_log_probabilities_is_that_of_the_text(greedy):
    stops = (int(greedy.tokens[0, 4]),)
    sample = SampleConfig(temperature=0.0, max_new_tokens=NEW, stop_ids=stops)
    result = generate(CONFIG, PARAMS, RAGGED, sample, KEY)
    for mean, row, length in zip(
        *(result.mean_logprobs, greedy.logprobs, result.lengths), strict=True
    ):
        np.testing.assert_allclose(mean, row[:length].mean() if length else 0.0)


def test_when_all_rows_have_stopped_decoding_ends(greedy):
    stop = int(greedy.tokens[0, 0])
    sample = SampleConfig(temperature=0.0, max_new_tokens=NEW, stop_ids=(stop,))
    calls = []
    result = generate(
        *(CONFIG, PARAMS, [RAGGED[0]] * 3, sample, KEY),
        on_tokens=lambda new, inside: calls.append(inside),
    )
    assert result.lengths.tolist() == [0, 0, 0] and not result.tokens.any()
    assert result.tokens.shape == (3, NEW)
    assert len(calls) == 1 and not calls[0].any()


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_ids_beyond_the_tokenizer_are_never_drawn(sample):
    """A padded vocabulary, whose padding would be sampled nearly every time."""
    kernel = PARAMS["lm_head"]["kernel"].copy()
    kernel[:, 40:] *= 50
    params = tree.replace(PARAMS, "lm_head/kernel", kernel)
    prompts = [[1], [2], [3]]
    free = generate(CONFIG, params, prompts, sample, KEY)
    assert (free.tokens >= 40).mean() > 0.5
    bound = generate(CONFIG, params, prompts, sample, KEY, num_tokens=40)
    assert (bound.tokens < 40).all() and np.isfinite(bound.logprobs).all()


def test_a_stream_gives_the_same_tokens_in_order(greedy):
    pieces = []

    def feed(new, inside):
        pieces.append((new.copy(), inside.copy()))

    generate(CONFIG, PARAMS, RAGGED, GREEDY, KEY, on_tokens=feed)
    # The first token comes alone.
    assert [new.shape for new, _ in pieces] == [(3, n) for n in (1, 2, 4, 8, NEW - 15)]
    assert all(inside.all() for _, inside in pieces)
    np.testing.assert_array_equal(
        np.concatenate([new for new, _ in pieces], axis=1), greedy.tokens
    )


def test_a_stream_can_end_the_generation(greedy):
    calls = []
    result = generate(
        *(CONFIG, PARAMS, RAGGED, GREEDY, KEY),
        on_tokens=lambda new, inside: calls.append(1) or True,
    )
    assert len(calls) == 1 and result.lengths.tolist() == [1] * 3
    np.testing.assert_array_equal(result.tokens[:, :1], greedy.tokens[:, :1])
    assert not result.tokens[:, 1:].any() and result.tokens.shape == (3, NEW)


@pytest.mark.slow
def test_other_prompts_of_one_bucket_compile_nothing(greedy, compilations):
    generate(CONFIG, PARAMS, [[1, 2, 3]] * 3, GREEDY, KEY)
    before = list(compilations)
    for lengths in ((1, 2, 3), (30, 5, 12), (10, 10, 10)):
        prompts = [list(range(1, n + 1)) for n in lengths]
        generate(CONFIG, PARAMS, prompts, GREEDY, jax.random.key(3))
    assert compilations == before
    # The count includes a program for another number of rows.
    generate(CONFIG, PARAMS, [[1, 2, 3]] * 5, GREEDY, KEY)
    assert len(compilations) > len(before)


RULES = {
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "top_n_sigma": 2.0,
    "xtc_probability": 0.5,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "dry_multiplier": 0.8,
    "no_repeat_ngram": 2,
    "bias_ids": (4, 9),
    "biases": (1.0, -2.0),
    "forbidden_ids": (3,),
    "min_new_tokens": 3,
    "stop_ids": (7, 8, 9),
    "stop_strings": ("zq", "xyz"),
}
# Tokens 0 to 25 are letters, and the others pairs of letters.
LETTERS = [chr(97 + i % 26).encode() * (1 + i // 26) for i in range(CONFIG.vocab_size)]


def test_other_settings_and_other_prompts_compile_nothing(greedy, compilations):
    """Neither a rule that no row used before, nor a length of another row."""
    before = list(compilations)
    call = (CONFIG, PARAMS, [[1, 2, 3], [4] * 30, [5]])
    texts = set()
    for rule, value in RULES.items():
        fields = {rule: value}
        if rule == "bias_ids":
            fields["biases"] = (1.0, -2.0)
        if rule == "biases":
            fields["bias_ids"] = (4, 9)
        sample = SampleConfig(max_new_tokens=NEW, **fields)
        result = generate(*call, sample, KEY, token_bytes=LETTERS)
        texts.add(result.tokens.tobytes())
        assert compilations == before, rule
    assert len(texts) > len(RULES) // 2
    # All in one row, none in the next, and other limits.
    samples = [SampleConfig(max_new_tokens=NEW, **RULES), GREEDY]
    samples.append(SampleConfig(max_new_tokens=3, temperature=0.2))
    result = generate(*call, samples, KEY, token_bytes=LETTERS)
    assert compilations == before
    assert result.lengths[1:].tolist() == [NEW, 3]
    alone = generate(*call, GREEDY, KEY)
    np.testing.assert_array_equal(result.tokens[1], alone.tokens[1])


def test_stop_strings_end_a_row_with_the_token_that_completes_them(greedy):
    letters = [[LETTERS[t].decode() for t in row] for row in greedy.tokens]
    # From inside a token to inside another, in the first row.
    text = "".join(letters[0][:8])
    stop = text[-4:]
    sample = SampleConfig(
        temperature=0.0, max_new_tokens=NEW, stop_strings=(stop, "?!")
    )
    result = generate(CONFIG, PARAMS, RAGGED, sample, KEY, token_bytes=LETTERS)
    for row, length, pieces in zip(result.tokens, result.lengths, letters, strict=True):
        texts = ["".join(pieces[: n + 1]) for n in range(NEW)]
        ends = [n + 1 for n, t in enumerate(texts) if stop in t] or [NEW]
        assert length == ends[0]
        assert row[length:].tolist() == [0] * (NEW - length)
    assert result.lengths[0] <= 8


def test_the_most_likely_tokens_are_those_of_a_full_forward_pass(greedy):
    result = generate(CONFIG, PARAMS, RAGGED, DRAWN, KEY, top_logprobs=5)
    assert result.top_tokens.shape == result.top_logprobs.shape == (3, NEW, 5)
    rows = [p + t.tolist() for p, t in zip(RAGGED, result.tokens, strict=True)]
    full = logprobs_of(rows)
    for i, prompt in enumerate(RAGGED):
        at = full[i, len(prompt) - 1 + np.arange(NEW)]
        order = np.argsort(-at, axis=1)[:, :5]
        np.testing.assert_array_equal(result.top_tokens[i], order)
        expected = np.take_along_axis(at, order, axis=1)
        np.testing.assert_allclose(result.top_logprobs[i], expected, atol=1e-5)
    assert greedy.top_tokens.shape == (3, NEW, 0)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_prompts_read_in_chunks_give_the_same(monkeypatch, sample):
    """Rows that end in the first, a middle and the last chunk, of 32 tokens each."""
    prompts = [RAGGED[2] * 2 + RAGGED[1], RAGGED[1], RAGGED[2] + RAGGED[1]]
    whole = generate(CONFIG, PARAMS, prompts, sample, KEY)
    assert prefill.chunk_widths(71, 3, 96) == [96]
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 100)
    assert prefill.chunk_widths(71, 3, 96) == [32, 32, 32]
    parts = generate(CONFIG, PARAMS, prompts, sample, KEY)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-5)
    if sample is GREEDY:
        np.testing.assert_array_equal(parts.tokens, naive_greedy(prompts, NEW))


def test_chunks_fit_the_memory_and_the_cache():
    for num_rows in (1, 3, 8, 64, 1000):
        for length in (1, 31, 32, 33, 1000, 5000, 9999):
            widths = prefill.chunk_widths(length, num_rows, 10_000)
            assert length <= sum(widths) <= 10_000
            most = prefill.PREFILL_TOKENS / num_rows
            assert max(widths) <= max(most, prefill.SMALLEST_BUCKET)
            assert len(set(widths)) <= 2


@pytest.mark.slow
def test_another_length_or_temperature_compiles_nothing(compilations):
    """Neither where prompt and new tokens are more than a power of two."""
    generate(LONG, LONG_PARAMS, [[1] * 5] * 2, GREEDY)
    before = list(compilations)
    for length, new, temperature in ((30, 2, 0.5), (32, 97, 0.0), (7, 505, 1.0)):
        sample = SampleConfig(max_new_tokens=new, temperature=temperature)
        generate(LONG, LONG_PARAMS, [[1] * length] * 2, sample)
    assert compilations == before
    # A longer prompt is read by another program, and decoded by the same.
    generate(LONG, LONG_PARAMS, [[1] * 40] * 2, GREEDY)
    assert compilations[len(before) :] == ["jit(begin)"]


def test_capacity():
    assert [capacity(n, 4000) for n in (1, 512, 513, 2048, 2049, 4000)] == [
        *(512, 512, 2048, 2048, 4000, 4000)
    ]
    assert capacity(5, 96) == 96


def test_bucket():
    assert [bucket(n, 1000) for n in (1, 32, 33, 64, 65, 512, 513, 1000)] == [
        *(32, 32, 64, 64, 128, 512, 1000, 1000)
    ]
    assert bucket(5, 20) == 20


@pytest.mark.slow
def test_the_whole_context_can_be_used():
    """Prompt and new tokens may fill the context exactly; one more is an error."""
    prompt = np.arange(CONFIG.context_length - NEW) % CONFIG.vocab_size
    result = generate(CONFIG, PARAMS, [prompt.tolist()], GREEDY, KEY)
    np.testing.assert_array_equal(result.tokens, naive_greedy([prompt.tolist()], NEW))
    with pytest.raises(
        ValueError, match=r"prompt 0 has 77 tokens, with 20 new ones 97: more than the "
    ):
        generate(CONFIG, PARAMS, [[0, *prompt.tolist()]], GREEDY, KEY)


OLD_KEY = jax.random.PRNGKey(0)
# Regular expressions: arguments of the call -> message.
WRONG = [
    ({"prompts": []}, r"no prompts: give at least one"),
    ({"prompts": 5}, r"prompts is 5: give a list of rows of token ids"),
    ({"prompts": "hello"}, r"prompts is a str, not a list of rows of token ids: enc"),
    ({"prompts": [1, 2, 3]}, r"prompts\[0\] is 1, not a row of token ids: a single pr"),
    ({"prompts": np.arange(3)}, r"prompts\[0\] is 0, not a row"),
    ({"prompts": ["hello"]}, r"prompt 0 is text: encode it first, \[tokenizer.encode"),
    ({"prompts": [[1], []]}, r"prompt 1 is empty: give at least one token"),
    ({"prompts": np.zeros((2, 3, 1), int)}, r"prompt 0 has shape \(3, 1\): give a row"),
    ({"prompts": [[1], [0.5, 1.0]]}, r"prompt 1 is of float64: token ids are int"),
    ({"prompts": [["hello"]]}, r"prompt 0 is of <U5: token ids are integers"),
    ({"prompts": [[1], [2, 48]]}, r"prompt 1 has the id 48: ids are 0 to 47"),
    ({"prompts": [[-1, 2]]}, r"prompt 0 has the id -1: ids are 0 to 47"),
    ({"prompts": [[40]], "num_tokens": 40}, r"the id 40: ids are 0 to 39"),
    ({"prompts": [[1] * 97]}, r"prompt 0 has 97 tokens.*; shorten the prompt$"),
    (
        {"prompts": [[1]], "sample": SampleConfig(max_new_tokens=96)},
        r"new ones 97: .* context of 96; shorten .* lower max_new_tokens to 95$",
    ),
    ({"num_tokens": 49}, r"num_tokens is 49: .* from 1 to model.vocab_size 48"),
    ({"num_tokens": 0}, r"num_tokens is 0"),
    ({"num_tokens": "all"}, r"num_tokens is 'all': it must be from 1 to model.voc"),
    ({"num_tokens": 10.0}, r"num_tokens is 10.0: it must be from 1"),
    ({"sample": SampleConfig(stop_ids=(48,), max_new_tokens=2)}, r"stop_ids: 48 is"),
    ({"sample": 0.8}, r"sample is a float, not a SampleConfig: the order is \(config"),
    ({"sample": KEY}, r"sample is a "),
    ({"key": -1}, r"key is -1: a seed must be in \[0, 2\*\*32\)"),
    ({"key": "a"}, r"key is 'a': make one with jax.random.key\(seed\)"),
    ({"key": OLD_KEY}, r"key is an array of uint32: make one with jax.random.key\(se"),
    ({"key": jax.random.split(KEY)}, r"key has shape \(2,\): give one key or 3 of"),
    ({"sample": [GREEDY] * 2}, r"sample has 2 configs for 3 prompts: give one for e"),
    ({"sample": SampleConfig(bias_ids=(48,), biases=(1.0,))}, r"bias_ids: 48 is not"),
    ({"sample": SampleConfig(forbidden_ids=tuple(range(48)))}, r"leaves no token"),
    ({"sample": SampleConfig(stop_strings=("a",))}, r"needs the text of the tokens: g"),
    ({"sample": SampleConfig(dry_multiplier=1.0)}, r"dry_multiplier needs the text"),
    ({"token_bytes": [b""] * 49}, r"token_bytes has 49 texts for the 48 ids"),
    ({"num_slots": 0}, r"num_slots is 0: it must be at least 1"),
    ({"top_logprobs": 49}, r"top_logprobs is 49: it must be from 0 to model.vocab"),
    ({"resume": [1]}, r"resume is a list: give the `state` of an earlier result"),
]


@pytest.mark.parametrize("changed, message", WRONG)
def test_wrong_calls_are_answered_before_anything_runs(monkeypatch, changed, message):
    def no_programs(*_):
        raise AssertionError("the check came too late")

    monkeypatch.setattr(engine, "programs_of", no_programs)
    call = {"config": CONFIG, "params": PARAMS, "prompts": RAGGED, "sample": GREEDY}
    call |= {"key": KEY, **changed}
    # Without the type checks of tests, as users call it.
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(generate)(**call)
    assert "\n" not in str(error.value)


def test_fields_of_the_config_are_no_arguments():
    call = (CONFIG, PARAMS, RAGGED)
    with pytest.raises(
        TypeError,
        match=r"^generate has no max_new_tokens: give sample=SampleConfig\(max_new_tok"
        r"ens=5\)$",
    ):
        generate(*call, max_new_tokens=5)
    with pytest.raises(
        TypeError, match=r"no temprature \(did you mean 'temperature'\?"
    ):
        generate(*call, temprature=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_parameters_that_are_not_finite_are_refused(bad, sample):
    scale = PARAMS["final_norm"]["scale"].copy()
    scale[3] = bad
    params = tree.replace(PARAMS, "final_norm/scale", scale)
    with pytest.raises(ValueError, match=r"logits are not finite: its parameters hold"):
        generate(CONFIG, params, RAGGED, sample, KEY)


def test_prompts_may_be_an_array_and_the_rest_has_defaults(compilations):
    """In a notebook: no mesh, no key, and the sampling of `SampleConfig()`."""
    prompts = np.arange(6).reshape(2, 3)
    first = generate(LONG, LONG_PARAMS, prompts)
    assert first.tokens.shape == (2, 256) and first.lengths.tolist() == [256, 256]
    before = len(compilations)
    for same in (prompts.tolist(), jax.numpy.asarray(prompts), list(prompts)):
        again = generate(LONG, LONG_PARAMS, same, SampleConfig(), jax.random.key(0))
        np.testing.assert_array_equal(again.tokens, first.tokens)
    assert "decode" not in compilations[before:]


TAPS = (
    Tap("resid_post"),
    Tap("attn_probs", layers=(1,), heads=(1, 0)),
    Tap("mlp_act", reduce="top_k", count=2),
    Tap("logits"),
)


@pytest.mark.slow
def test_taps_read_prompts_and_new_tokens_as_a_full_pass_would():
    """Rows of different lengths, one at a time after another, and edited logits."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (7, 4)]
    bias = np.zeros(CONFIG.vocab_size, np.float32)
    bias[5] = 100.0
    edits = (Edit("logits", "add", bias, position=[6, 9]),)
    samples = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (5, 8)]
    given = dict(taps=TAPS, edits=edits, num_slots=1)
    out = generate(CONFIG, PARAMS, prompts, samples, **given)
    assert out.tokens[0, 0] == 5 and out.tokens[0, 3] == out.tokens[1, 6] == 5
    pass_over = jax.jit(
        lambda p, x: forward(CONFIG, p, x, taps=TAPS, edits=edits).trace
    )
    for row, prompt in enumerate(prompts):
        tokens = [*prompt, *out.rows[row].tolist()]
        full = pass_over(PARAMS, np.array([tokens]))
        for tap in TAPS:
            axis = int(tap.site != "logits")
            right = jax.tree.map(lambda x, axis=axis: x.take(0, axis), full[tap.site])
            ours = out.traces[row][tap.site]
            for a, b in zip(*map(jax.tree.leaves, (ours, right)), strict=True):
                assert a.shape == b.shape, tap
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_decoding_with_taps_moves_few_more_bytes():
    config = toy(num_layers=3, model_dim=64, hidden_dim=256, vocab_size=512)
    params = make_params(config)

    def moved(*taps):
        runs = engine.Engine(config, params, num_slots=1, max_length=32, taps=taps)
        request = engine.Request(np.ones(3, np.int32), GREEDY, jax.random.key(0))
        runs.submit(request)
        runs.begin()
        given = runs._decoding(runs._automata.on_device, 16)
        program = runs._programs.decode._jitted.lower(*given, steps=8).compile()
        return program.cost_analysis()["bytes accessed"]

    taps = (Tap("resid_post"), Tap("attn_probs", layers=(2,)), Tap("mlp_act", (1,)))
    assert 1 < moved(*taps) / moved() <= 1.05


def test_taps_that_a_generation_cannot_have():
    for tap, message in (
        (Tap("z", positions=(1,)), "leave out positions="),
        (Tap("attn_lse", reduce="max"), "its last axis are the tokens"),
        (Tap("z", layers=(9,)), "layer 9 is not among"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(CONFIG, PARAMS, [[1, 2]], GREEDY, taps=(tap,))


@pytest.mark.slow
def test_edits_change_prompts_and_new_tokens_where_a_full_pass_would():
    """One token of the prompt is steered, and some new ones."""
    prompt = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 7).tolist()
    vector = np.random.default_rng(4).normal(size=CONFIG.model_dim)
    edits = (
        Edit("resid_post", "add", np.float32(vector), layer=0, position=[3, 12, 13]),
        Edit("z", "scale", 0.0, layer=1, head=1),
    )
    out = generate(CONFIG, PARAMS, [prompt], GREEDY, edits=edits)
    row = [*prompt, *out.tokens[0].tolist()]
    call = jax.jit(lambda p, x: forward(CONFIG, p, x, edits=edits).logits[0])
    logits = call(PARAMS, np.array([row]))
    logprobs = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(logprobs.argmax(-1), out.tokens[0])
    chosen = np.take_along_axis(logprobs, out.tokens[0][:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, out.logprobs[0], atol=1e-4)
    plain = generate(CONFIG, PARAMS, [prompt] * 3, GREEDY)
    assert (plain.tokens[:1] != out.tokens).any()


@pytest.mark.parametrize(
    "edit, message",
    [
        pytest.param(
            # Of the token after the last one, for which no step runs any more.
            Edit("z", "scale", 0.0, position=3 + GREEDY.max_new_tokens),
            f"'z' has changed nothing: position {3 + GREEDY.max_new_tokens}",
            marks=pytest.mark.slow,
        ),
        (Edit("z", "scale", 0.0, layer=9), "layer 9 is not among"),
    ],
)
def test_an_edit_that_does_not_fire_is_an_error(edit, message):
    with pytest.raises(ValueError, match=message):
        generate(CONFIG, PARAMS, [[1, 2, 3]], GREEDY, edits=(edit,))
