"""Generation with each kind of cache equals that with the plain one."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.config import SampleConfig
from jaxlm.infer import check_arguments, prefill
from jaxlm.infer.generate import generate
from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import SPARE, append, extend, unstack_layers
from jaxlm.model.transformer import forward
from jaxlm.ops.attention.dispatch import attention
from jaxlm.ops.attention.spec import AttentionSpec, Mask
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap

WINDOW = 6
# A ring of 38 tokens in a context of 200; two periods and a rest.
CONFIG = toy(
    num_layers=3,
    layer_pattern=("local", "global"),
    window=WINDOW,
    context_length=200,
)
ALL_LOCAL = toy(num_layers=2, layer_pattern=("local",), window=9, context_length=200)
PARAMS = {c: make_params(c, std=0.4) for c in (CONFIG, ALL_LOCAL)}
RNG = np.random.default_rng(0)
# Below, around and above the window and the ring, and most of the context.
PROMPTS = [RNG.integers(0, 48, n).tolist() for n in (1, 6, 38, 39, 130)]
DRAWN = SampleConfig(max_new_tokens=70)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def run(config, kind, prompts=PROMPTS, sample=DRAWN, **options):
    return generate(config, PARAMS[config], prompts, sample, 3, cache=kind, **options)


@pytest.fixture(scope="module")
def plain():
    return run(CONFIG, "full", return_state=True)


def assert_same(ours, plain):
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    np.testing.assert_allclose(ours.logprobs, plain.logprobs, **CLOSE)


@pytest.mark.slow
def test_a_ring_gives_the_same_in_less_memory(plain):
    """It turns around several times, while prompts are read and while decoding."""
    ring = run(CONFIG, "ring", return_state=True)
    assert_same(ring, plain)
    lengths = [layer.keys.shape[1] for layer in ring.state.cache.layers]
    assert lengths == [WINDOW + SPARE, 200, WINDOW + SPARE]
    assert ring.cache_bytes == plain.cache_bytes * sum(lengths) // 600


@pytest.mark.slow
def test_a_ring_in_slots(plain):
    """Each prompt is read alone and put into its place."""
    assert_same(run(CONFIG, "ring", num_slots=2), plain)


@pytest.mark.slow
def test_a_common_beginning_is_read_once(monkeypatch):
    """It is longer than the ring; rows end at once or much later."""
    common = PROMPTS[-1][:70]
    prompts = [[*common, *row[:50]] for row in PROMPTS]
    read, begin = [], prefill.Reading.__init__

    def record(self, reader, rows, *rest, **options):
        read.append([len(row) for row in rows])
        begin(self, reader, rows, *rest, **options)

    monkeypatch.setattr(prefill.Reading, "__init__", record)
    ours = run(CONFIG, "ring", prompts)
    assert read == [[70], [71, 76, 108, 109, 120]]
    # In slots each row begins with a copy of it, two of one size at once.
    read.clear()
    slots = run(CONFIG, "ring", prompts, num_slots=2)
    assert read == [[70], [71, 76], [108, 109], [120]]
    monkeypatch.setattr(prefill, "SHORTEST_COMMON", 71)
    plain = run(CONFIG, "ring", prompts)
    for result in (ours, slots):
        assert_same(result, plain)


@pytest.mark.slow
def test_prompts_in_chunks_turn_the_ring_around(plain, monkeypatch):
    """Chunks of 32 tokens, of which the shorter rows have padding only."""
    monkeypatch.setattr("jaxlm.infer.prefill.PREFILL_TOKENS", 32 * len(PROMPTS))
    assert_same(run(CONFIG, "ring"), plain)


@pytest.mark.slow
def test_a_ring_in_all_layers():
    assert_same(run(ALL_LOCAL, "ring"), run(ALL_LOCAL, "full"))


@pytest.mark.slow
def test_a_conversation_goes_on_from_a_ring():
    """Also where the ring has lost what another continuation sees."""
    short, prompts = SampleConfig(max_new_tokens=20), PROMPTS[1:3]
    first = run(CONFIG, "ring", prompts, short, return_state=True)
    pairs = zip(prompts, first.tokens.tolist(), strict=True)
    more = [[*prompt, *new, 1, 2] for prompt, new in pairs]
    second = run(CONFIG, "ring", more, short, resume=first.state, return_state=True)
    assert second.prefill_tokens.tolist() == [2, 2]
    assert_same(second, run(CONFIG, "ring", more, short))
    # A few tokens back, and many.
    state = second.state
    few, many = [[*row[:-5], 5] for row in more], [more[0][:10], more[1][:30]]
    for other, read in ((few, [1, 1]), (many, [10, 30])):
        again = run(CONFIG, "ring", other, short, resume=state, return_state=True)
        state = again.state
        assert again.prefill_tokens.tolist() == read
        assert_same(again, run(CONFIG, "ring", other, short))
    with pytest.raises(ValueError, match="state has the cache ring, not full"):
        run(CONFIG, "full", other, short, resume=state)


def test_quantized_keys_are_those_that_numpy_rounds():
    """Attention over them is that over a plain cache of the rounded keys and values."""
    keys, values = RNG.normal(size=(2, 2, 6, CONFIG.num_kv_heads, CONFIG.head_dim))
    query = RNG.normal(size=(2, 1, CONFIG.num_heads, CONFIG.head_dim))

    @partial(jax.jit, static_argnums=0)
    def attended(kind, keys, values):
        layers = init_cache(CONFIG, 2, 200, kind=kind).layers
        layer, *_ = unstack_layers(layers, CONFIG.num_layers)
        start, lengths = jnp.zeros(2, jnp.int32), jnp.full(2, 5, jnp.int32)
        layer = append(layer, start, keys[:, :5], values[:, :5])
        spec = AttentionSpec(1.0, Mask(query_positions=lengths[:, None]))
        after, *seen = extend(layer, lengths, keys[:, 5:], values[:, 5:], spec)
        found, _ = attention(jnp.asarray(query), *seen, implementation="reference")
        return after, found

    query, keys, values = jax.tree.map(np.float32, (query, keys, values))
    size = {}
    for kind, plain, most in (
        ("int8", "full", 127),
        ("int4", "full", 7),
        ("ring_int4", "ring", 7),
    ):
        scales = [abs(x).max(-1, keepdims=True) / most for x in (keys, values)]
        rounded = [
            np.round(x / s) * s for x, s in zip((keys, values), scales, strict=True)
        ]
        caches = {}
        caches[kind], ours = attended(kind, keys, values)
        caches[plain], expected = attended(plain, *rounded)
        size |= {
            k: sum(x.nbytes for x in jax.tree.leaves(c)) for k, c in caches.items()
        }
        np.testing.assert_allclose(ours, expected, **CLOSE)
    # Of a head's H values a byte or half of one, and a scale of 4 bytes.
    head_dim = CONFIG.head_dim
    for kind, plain, stored in (
        ("int8", "full", head_dim + 4),
        ("int4", "full", head_dim / 2 + 4),
        ("ring_int4", "ring", head_dim / 2 + 4),
    ):
        assert size[kind] == size[plain] * stored / (4 * head_dim)
    assert size["ring"] < size["full"]


@pytest.mark.slow
def test_fewer_bits_lose_little(plain):
    """Of the probabilities of the same text, read in one piece and by tokens."""
    tokens = np.array([[*PROMPTS[-1], *plain.tokens[-1]]])

    @partial(jax.jit, static_argnums=2)
    def read(params, tokens, kind):
        cache = init_cache(CONFIG, 1, 200, kind=kind)
        first = forward(CONFIG, params, tokens[:, :30], cache=cache)

        def one(cache, token):
            out = forward(CONFIG, params, token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        _, logits = jax.lax.scan(one, first.cache, tokens[:, 30:].T)
        full = forward(CONFIG, params, tokens).logits[:, 30:]
        ours, exact = (jax.nn.log_softmax(x) for x in (logits.swapaxes(0, 1), full))
        return (jax.numpy.exp(exact) * (exact - ours)).sum(-1).mean()

    # In nats a token; see docs/decoding.md for a trained model.
    int8, int4 = (read(PARAMS[CONFIG], tokens, f"ring_{n}") for n in ("int8", "int4"))
    assert 1e-7 < float(int8) < 5e-4 < float(int4) < 0.2
    # One byte and a scale of four for 4 elements, instead of 16 bytes.
    int8 = run(CONFIG, "int8", num_slots=2)
    assert int8.cache_bytes * 2 == plain.cache_bytes * 2 // 5
    assert (int8.tokens == plain.tokens).mean() > 0.3


def test_sites_of_single_keys_need_a_full_cache():
    params = jax.tree.map(jax.numpy.asarray, PARAMS[CONFIG])
    edit = Edit("attn_probs", "scale", 0.5)
    for kind in ("ring", "int8"):
        call = (CONFIG, params, np.ones((1, 2), int))
        cache = init_cache(CONFIG, 1, 200, kind=kind)
        with pytest.raises(ValueError, match="'attn_probs' is computed from the keys"):
            forward(*call, taps=(Tap("attn_probs"),), cache=cache)
        with pytest.raises(ValueError, match="'attn_probs' has a value for each token"):
            forward(*call, edits=(edit,), cache=cache)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    check = inspect.unwrap(check_arguments.check_cache)
    with pytest.raises(ValueError, match="cache is 'small': choose one of full, ring"):
        check(CONFIG, PARAMS[CONFIG], 1, 50, "small")
    monkeypatch.setattr(check_arguments, "available_memory", lambda: 100_000)
    message = (
        r"the full cache of 5 rows of 200 tokens needs 0.000179 GiB on a device, w"
    )
    with pytest.raises(ValueError, match=message):
        run(CONFIG, "full")
