"""Presets have the published sizes, and each kind of model trains and decodes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks_case import slow_but
from model_case import ids, make

from jaxlm import tree
from jaxlm.config import EXECUTION_FIELDS, ModelConfig
from jaxlm.model.initialization import init, init_cache
from jaxlm.model.presets import PRESETS, preset, toy
from jaxlm.model.transformer import forward
from jaxlm.ops.loss import cross_entropy_sums

# What `sum(p.numel())` is in transformers 5.23.0 for models of these sizes on the meta
# device (tests/parity/make_counts.py). The Hub's pages of the models show the same
# totals, apart from models whose tied head is stored or counted twice.
COUNTS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "phi3-mini-4k": 3_821_079_552,
    "phi3-mini-128k": 3_821_079_552,
    "phi4": 14_659_507_200,
    "phi4-mini": 3_836_021_760,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}


def transformer_count(d: int, hidden: int, layers: int = 6, vocab: int = 37_000) -> int:
    """The original decoder without cross-attention, by the formulas of the paper."""
    attention = 4 * d * d
    feed_forward = 2 * d * hidden + hidden + d
    norms = 2 * 2 * d
    return vocab * d + layers * (attention + feed_forward + norms)


COUNTS["transformer-base"] = transformer_count(512, 2048)
COUNTS["transformer-big"] = transformer_count(1024, 4096)


def test_every_preset_has_a_count():
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    shapes = jax.eval_shape(partial(init, preset(name)), jax.random.key(0))
    assert tree.count(shapes) == COUNTS[name]


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"no preset 'lama3-8b' \(did you mean 'lla"):
        preset("lama3-8b")


# Sizes that `toy` may change; everything else is a choice that it keeps.
SIZES = {
    *("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads"),
    *("head_dim", "hidden_dim", "context_length", "window", "rope_scaling"),
    *("attention_scale", "embedding_scale", "init_std"),
    *("num_experts", "experts_per_token"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_toys_keep_every_choice(name):
    config = preset(name)
    small = toy(config)
    for f in dataclasses.fields(ModelConfig):
        before, after = getattr(config, f.name), getattr(small, f.name)
        if f.name not in SIZES:
            assert before == after, f.name
        else:
            assert (before is None) == (after is None), f.name
    ratio = config.num_heads // config.num_kv_heads
    assert small.num_heads == ratio * small.num_kv_heads
    assert small.num_layers > len(config.layer_pattern)
    assert small.num_layers > len(config.rope_pattern)
    assert small.window is None or small.window < 64
    assert (small.num_experts > small.experts_per_token) == (config.num_experts > 0)
    assert (small.embedding_scale == 1.0) == (config.embedding_scale == 1.0)
    if config.rope_scaling is not None:
        assert small.rope_scaling.kind == config.rope_scaling.kind
        assert small.rope_scaling.factor == config.rope_scaling.factor
        assert small.rope_scaling.original_context_length < 64
    if config.attention_scale is not None:
        relative = config.attention_scale * config.head_dim**0.5
        assert small.attention_scale * small.head_dim**0.5 == pytest.approx(relative)


def kinds() -> dict[str, ModelConfig]:
    """One toy for each kind of model, grouped-query where the kind has such.

    Models that differ in numbers and in nothing else run the same program.
    """
    found = {}
    for name, config in PRESETS.items():
        small = toy(config)
        scaling = small.rope_scaling
        kind = dataclasses.replace(
            small,
            rope_theta=1e4,
            norm_epsilon=1e-6,
            attention_scale=None,
            embedding_scale=1.0 if small.embedding_scale == 1.0 else 2.0,
            rope_scaling=scaling if scaling and scaling.kind == "longrope" else None,
            num_heads=3,
            num_kv_heads=3,
            tied_embeddings=True,
        )
        grouped = small.num_heads > small.num_kv_heads
        old = found.get(kind, (name, small))[1]
        if kind not in found or (grouped and old.num_heads == old.num_kv_heads):
            found[kind] = (name, small)
    return dict(found.values())


KINDS = kinds()
# The one that transformers does not have, and some that have every choice between them.
# All but the first equal transformers in any case (tests/parity).
SLOW = ("transformer-base", "gpt2-124m", "gpt-oss-20b", "gemma2-2b", "gemma3-270m")
SLOW += ("mistral-7b-v0.1", "phi4-mini", "olmo2-32b", "smollm3-3b")
RARE = [pytest.param(k, marks=pytest.mark.nightly) for k in KINDS if k not in SLOW]


def test_slow_proofs_have_every_choice():
    def choices(names):
        numbers = {"rope_theta", "norm_epsilon"}
        fields = {f.name for f in dataclasses.fields(ModelConfig)} - SIZES - numbers
        return {(f, getattr(KINDS[name], f)) for name in names for f in fields}

    assert choices(SLOW) == choices(KINDS)


@pytest.mark.parametrize("name", slow_but((), SLOW) + RARE)
def test_a_toy_trains_and_decodes(name):
    """A step of SGD lowers the loss; a token at a time gives the same logits."""
    config, params = make(KINDS[name])
    tokens = ids(2, 21, config.vocab_size)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    @jax.jit
    def step(params):
        def loss(params):
            logits = forward(config, params, inputs).logits
            total, _ = cross_entropy_sums(logits, targets, jnp.ones(targets.shape))
            return total / targets.size, logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        # So small a step must follow the gradient's prediction, to first order.
        norm = tree.global_norm(grads)
        rate = 1e-2 / norm
        new = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return value, logits, new, norm

    @jax.jit
    def decode(params):
        cache = init_cache(config, 2, 24, jnp.float32)

        def one(cache, token):
            out = forward(config, params, token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        cache, logits = jax.lax.scan(one, cache, inputs.T)
        return logits.swapaxes(0, 1), cache.lengths

    loss, logits, new, norm = step(params)
    assert norm > 0.1
    fall = float(loss - step(new)[0])
    assert fall == pytest.approx(1e-2 * float(norm), rel=0.3)
    decoded, lengths = decode(params)
    assert lengths.tolist() == [20, 20]
    # f32 sums in another order.
    np.testing.assert_allclose(decoded, logits, atol=1e-4 * max(1.0, logits.std()))


def test_no_preset_chooses_how_it_is_computed():
    default = ModelConfig(
        num_layers=1,
        model_dim=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        hidden_dim=1,
        context_length=1,
    )
    for config in PRESETS.values():
        for field in EXECUTION_FIELDS:
            assert getattr(config, field) == getattr(default, field)
