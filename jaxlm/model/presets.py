"""Published models as configs: `preset("llama3.2-1b")`, and `toy` versions of them.

Sizes are those of the models' `config.json` files on the Hugging Face Hub and of the
papers named below; tests hold the parameter counts of all. A name is
`family[version]-size`, in lower case.
"""

import dataclasses
import math
from functools import partial
from typing import Any

from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.fields import nearest


def original_transformer(**sizes: Any) -> ModelConfig:
    """Decoder of Vaswani et al. 2017, arXiv:1706.03762, without cross-attention.

    The vocabulary is that of the English-German model. Sinusoids have no length limit;
    the context here is ours.
    """
    width = sizes["model_dim"]
    return ModelConfig(
        vocab_size=37_000,
        num_layers=6,
        num_kv_heads=sizes["num_heads"],
        head_dim=64,
        context_length=1024,
        position="sinusoidal",
        activation="relu",
        gated=False,
        feed_forward_bias=True,
        norm="layer",
        norm_bias=True,
        norm_placement="post",
        final_norm=False,
        embedding_scale=math.sqrt(width),
        init="fan_in",
        init_std=width**-0.5,
        **sizes,
    )


def gpt2(layers: int, width: int, heads: int) -> ModelConfig:
    """GPT-2 (Radford et al. 2019)."""
    return ModelConfig(
        vocab_size=50_257,
        num_layers=layers,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        hidden_dim=4 * width,
        context_length=1024,
        position="learned",
        attention_bias=True,
        attention_output_bias=True,
        activation="gelu_tanh",
        gated=False,
        feed_forward_bias=True,
        norm="layer",
        norm_bias=True,
        norm_epsilon=1e-5,
    )


# Families: what their models share. A keyword of a call replaces that of its family.

# Llama 2 (arXiv:2307.09288), and what Llama-shaped models share.
llama = partial(
    ModelConfig,
    vocab_size=32_000,
    head_dim=128,
    context_length=4096,
    norm_epsilon=1e-5,
    tied_embeddings=False,
)
# Llama 3 (arXiv:2407.21783).
llama3 = partial(
    llama,
    vocab_size=128_256,
    num_kv_heads=8,
    context_length=8192,
    rope_theta=500_000.0,
)
# Qwen2 (arXiv:2407.10671) and Qwen2.5 (arXiv:2412.15115). Their config.json has a
# sliding window, but with `use_sliding_window` false.
qwen2 = partial(
    llama,
    vocab_size=151_936,
    context_length=131_072,
    rope_theta=1_000_000.0,
    attention_bias=True,
    norm_epsilon=1e-6,
)
# Qwen3 (arXiv:2505.09388), and its mixtures of experts.
qwen3 = partial(
    llama,
    vocab_size=151_936,
    num_kv_heads=8,
    context_length=40_960,
    rope_theta=1_000_000.0,
    qk_norm="head",
    norm_epsilon=1e-6,
)
qwen3_moe = partial(qwen3, num_experts=128, experts_per_token=8)
# Mistral 7B (arXiv:2310.06825) from v0.2 on, and Mistral Nemo.
mistral = partial(
    llama,
    num_heads=32,
    num_kv_heads=8,
    hidden_dim=14_336,
    context_length=32_768,
    rope_theta=1_000_000.0,
)
# Mixtral (arXiv:2401.04088); 8x22B with the vocabulary of the base model.
mixtral = partial(mistral, num_experts=8, experts_per_token=2)
# gpt-oss (arXiv:2508.10925).
gpt_oss = partial(
    llama,
    vocab_size=201_088,
    model_dim=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    hidden_dim=2880,
    context_length=131_072,
    rope_theta=150_000.0,
    rope_scaling=RopeScaling(
        kind="yarn", factor=32.0, original_context_length=4096, truncate=False
    ),
    layer_pattern=("local", "global"),
    window=128,
    attention_bias=True,
    attention_output_bias=True,
    attention_sinks=True,
    activation="swiglu_clamped",
    feed_forward_bias=True,
    experts_per_token=4,
    router_bias=True,
)
# Phi-3 (arXiv:2404.14219), Phi-4 (arXiv:2412.08905) and Phi-4-mini. The long-context
# ones have a window of 262,144 in their config.json, more than their context: it hides
# nothing and is left out here.
phi3 = partial(llama, num_layers=32, model_dim=3072, hidden_dim=8192)
# OLMo 2 (arXiv:2501.00656).
olmo2 = partial(
    llama,
    vocab_size=100_352,
    rope_theta=500_000.0,
    qk_norm="full",
    norm_epsilon=1e-6,
    norm_placement="output",
)
# SmolLM2 (arXiv:2502.02737).
smollm2 = partial(
    llama,
    vocab_size=49_152,
    head_dim=64,
    context_length=8192,
    rope_theta=100_000.0,
    tied_embeddings=True,
)


def llama3_long(factor: float, **choices: Any) -> ModelConfig:
    """Llama 3.1 and 3.2: rotary frequencies are stretched by `factor`."""
    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        original_context_length=8192,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    return llama3(context_length=131_072, rope_scaling=scaling, **choices)


def gemma(**choices: Any) -> ModelConfig:
    """Gemma (arXiv:2403.08295), and what its successors share."""
    common: dict[str, Any] = {
        "vocab_size": 256_000,
        "head_dim": 256,
        "context_length": 8192,
        "activation": "gelu_tanh",
        "norm": "rms_unit_offset",
        "embedding_scale": math.sqrt(choices["model_dim"]),
    }
    return ModelConfig(**{**common, **choices})


# Gemma 2 (arXiv:2408.00118).
gemma2 = partial(
    gemma,
    layer_pattern=("local", "global"),
    window=4096,
    attention_scale=256**-0.5,
    attention_soft_cap=50.0,
    final_soft_cap=30.0,
    norm_placement="both",
)
# Gemma 3 (arXiv:2503.19786), its text part.
gemma3 = partial(
    gemma,
    vocab_size=262_144,
    context_length=32_768,
    layer_pattern=("local",) * 5 + ("global",),
    window=512,
    rope_theta=1_000_000.0,
    rope_local_theta=10_000.0,
    qk_norm="head",
    attention_scale=256**-0.5,
    norm_placement="both",
)
# Gemma 3 from 4B up; the table has 64 more rows, for pictures.
gemma3_long = partial(
    gemma3,
    vocab_size=262_208,
    context_length=131_072,
    window=1024,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
)

# Divisors of the 48 rotary frequencies, as in the models' config.json.
# fmt: off
_PHI3_SHORT = (
    1.1, 1.1, 1.1, 1.3000000000000003, 1.3500000000000003, 1.3500000000000003,
    1.4000000000000004, 1.5500000000000005, *[2.000000000000001] * 17,
    *[2.0500000000000007] * 6, 2.1000000000000005, 2.1000000000000005,
    2.1500000000000004, *[2.25] * 5, 2.3999999999999995, 2.4499999999999993,
    2.499999999999999, 2.6999999999999984, 2.6999999999999984, 2.7499999999999982,
    2.799999999999998, 2.8999999999999977, 3.049999999999997,
)
_PHI3_LONG = (
    1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558,
    1.5699999332427979, 1.7999999523162842, 2.129999876022339, 2.129999876022339,
    3.009999990463257, 5.910000324249268, 6.950000286102295, 9.070000648498535,
    9.930000305175781, 10.710000038146973, 11.130000114440918, 14.609999656677246,
    15.409998893737793, 19.809999465942383, 37.279998779296875, 38.279998779296875,
    38.599998474121094, 40.12000274658203, 46.20000457763672, 50.940006256103516,
    53.66000747680664, 54.9373893737793, 56.89738845825195, 57.28738784790039,
    59.98738479614258, 60.86738586425781, 60.887386322021484, 61.71739196777344,
    62.91739273071289, 62.957393646240234, 63.41739273071289, 63.8173942565918,
    63.83739471435547, 63.897396087646484, 63.93739700317383, 64.06739807128906,
    64.11434936523438, 64.12435150146484, 64.15435028076172, 64.19435119628906,
    64.24435424804688, 64.57435607910156, 64.69000244140625, 64.76000213623047,
)
_PHI4_MINI_LONG = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817,
    2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687,
    4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894,
    8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884,
    32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97,
    33.28, 33.49, 33.5, 44.16, 47.77,
)
# fmt: on


def _longrope(short: tuple[float, ...], long: tuple[float, ...]) -> RopeScaling:
    return RopeScaling(
        kind="longrope",
        original_context_length=4096,
        short_factors=short,
        long_factors=long,
    )


def _sized(layers: int, width: int, heads: int, kv: int, hidden: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "model_dim": width,
        "num_heads": heads,
        "num_kv_heads": kv,
        "hidden_dim": hidden,
    }


PRESETS: dict[str, ModelConfig] = {
    "transformer-base": original_transformer(
        model_dim=512, num_heads=8, hidden_dim=2048
    ),
    "transformer-big": original_transformer(
        model_dim=1024, num_heads=16, hidden_dim=4096
    ),
    "gpt2-124m": gpt2(12, 768, 12),
    "gpt2-355m": gpt2(24, 1024, 16),
    "gpt2-774m": gpt2(36, 1280, 20),
    "gpt2-1.5b": gpt2(48, 1600, 25),
    "llama2-7b": llama(**_sized(32, 4096, 32, 32, 11_008)),
    "llama2-13b": llama(**_sized(40, 5120, 40, 40, 13_824)),
    "llama2-70b": llama(**_sized(80, 8192, 64, 8, 28_672)),
    "llama3-8b": llama3(**_sized(32, 4096, 32, 8, 14_336)),
    "llama3-70b": llama3(**_sized(80, 8192, 64, 8, 28_672)),
    "llama3.1-8b": llama3_long(8.0, **_sized(32, 4096, 32, 8, 14_336)),
    "llama3.1-70b": llama3_long(8.0, **_sized(80, 8192, 64, 8, 28_672)),
    "llama3.1-405b": llama3_long(8.0, **_sized(126, 16_384, 128, 8, 53_248)),
    "llama3.2-1b": llama3_long(
        32.0, **_sized(16, 2048, 32, 8, 8192), head_dim=64, tied_embeddings=True
    ),
    "llama3.2-3b": llama3_long(
        32.0, **_sized(28, 3072, 24, 8, 8192), tied_embeddings=True
    ),
    "qwen2-0.5b": qwen2(
        **_sized(24, 896, 14, 2, 4864), head_dim=64, tied_embeddings=True
    ),
    "qwen2-1.5b": qwen2(**_sized(28, 1536, 12, 2, 8960), tied_embeddings=True),
    "qwen2-7b": qwen2(**_sized(28, 3584, 28, 4, 18_944), vocab_size=152_064),
    "qwen2.5-0.5b": qwen2(
        **_sized(24, 896, 14, 2, 4864),
        head_dim=64,
        context_length=32_768,
        tied_embeddings=True,
    ),
    "qwen2.5-7b": qwen2(**_sized(28, 3584, 28, 4, 18_944), vocab_size=152_064),
    "qwen3-0.6b": qwen3(**_sized(28, 1024, 16, 8, 3072), tied_embeddings=True),
    "qwen3-1.7b": qwen3(**_sized(28, 2048, 16, 8, 6144), tied_embeddings=True),
    "qwen3-4b": qwen3(**_sized(36, 2560, 32, 8, 9728), tied_embeddings=True),
    "qwen3-8b": qwen3(**_sized(36, 4096, 32, 8, 12_288)),
    "qwen3-14b": qwen3(**_sized(40, 5120, 40, 8, 17_408)),
    "qwen3-32b": qwen3(**_sized(64, 5120, 64, 8, 25_600)),
    "qwen3-30b-a3b": qwen3_moe(**_sized(48, 2048, 32, 4, 768)),
    "qwen3-235b-a22b": qwen3_moe(**_sized(94, 4096, 64, 4, 1536)),
    "gpt-oss-20b": gpt_oss(num_layers=24, num_experts=32),
    "gpt-oss-120b": gpt_oss(num_layers=36, num_experts=128),
    "gemma-2b": gemma(**_sized(18, 2048, 8, 1, 16_384)),
    "gemma-7b": gemma(**_sized(28, 3072, 16, 16, 24_576)),
    "gemma2-2b": gemma2(**_sized(26, 2304, 8, 4, 9216)),
    "gemma2-9b": gemma2(**_sized(42, 3584, 16, 8, 14_336)),
    "gemma2-27b": gemma2(
        **_sized(46, 4608, 32, 16, 36_864), head_dim=128, attention_scale=144**-0.5
    ),
    "gemma3-270m": gemma3(**_sized(18, 640, 4, 1, 2048)),
    "gemma3-1b": gemma3(**_sized(26, 1152, 4, 1, 6912)),
    "gemma3-4b": gemma3_long(**_sized(34, 2560, 8, 4, 10_240)),
    "gemma3-12b": gemma3_long(**_sized(48, 3840, 16, 8, 15_360)),
    "gemma3-27b": gemma3_long(
        **_sized(62, 5376, 32, 16, 21_504), head_dim=128, attention_scale=168**-0.5
    ),
    "mistral-7b-v0.1": mistral(
        num_layers=32,
        model_dim=4096,
        rope_theta=10_000.0,
        layer_pattern=("local",),
        window=4096,
    ),
    "mistral-7b-v0.3": mistral(num_layers=32, model_dim=4096, vocab_size=32_768),
    "mistral-nemo-12b": mistral(
        num_layers=40, model_dim=5120, vocab_size=131_072, context_length=131_072
    ),
    "mixtral-8x7b": mixtral(num_layers=32, model_dim=4096),
    "mixtral-8x22b": mixtral(**_sized(56, 6144, 48, 8, 16_384), context_length=65_536),
    "phi3-mini-4k": phi3(
        vocab_size=32_064,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        layer_pattern=("local",),
        window=2047,
    ),
    "phi3-mini-128k": phi3(
        vocab_size=32_064,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        context_length=131_072,
        rope_scaling=_longrope(_PHI3_SHORT, _PHI3_LONG),
    ),
    "phi4": phi3(
        **_sized(40, 5120, 40, 10, 17_920),
        vocab_size=100_352,
        context_length=16_384,
        rope_theta=250_000.0,
    ),
    "phi4-mini": phi3(
        vocab_size=200_064,
        num_heads=24,
        num_kv_heads=8,
        context_length=131_072,
        rope_fraction=0.75,
        rope_scaling=_longrope((1.0,) * 48, _PHI4_MINI_LONG),
        tied_embeddings=True,
    ),
    "olmo2-1b": olmo2(**_sized(16, 2048, 16, 16, 8192)),
    "olmo2-7b": olmo2(**_sized(32, 4096, 32, 32, 11_008)),
    "olmo2-13b": olmo2(**_sized(40, 5120, 40, 40, 13_824)),
    "olmo2-32b": olmo2(**_sized(64, 5120, 40, 8, 27_648)),
    "smollm2-135m": smollm2(**_sized(30, 576, 9, 3, 1536)),
    "smollm2-360m": smollm2(**_sized(32, 960, 15, 5, 2560)),
    "smollm2-1.7b": smollm2(**_sized(24, 2048, 32, 32, 8192), rope_theta=130_000.0),
    # Every fourth layer has no rotation (NoPE).
    "smollm3-3b": llama(
        **_sized(36, 2048, 16, 4, 11_008),
        vocab_size=128_256,
        context_length=65_536,
        rope_theta=5_000_000.0,
        rope_pattern=(True, True, True, False),
        norm_epsilon=1e-6,
        tied_embeddings=True,
    ),
}


def preset(name: str) -> ModelConfig:
    """The config of a published model.

    Raises:
      ValueError: for a name that is not in `PRESETS`, with the nearest one.
    """
    if name not in PRESETS:
        raise ValueError(
            f"no preset {name!r}{nearest(str(name), list(PRESETS))}: the names are "
            "listed in jaxlm.model.presets.PRESETS"
        )
    return PRESETS[name]


def toy(config: ModelConfig) -> ModelConfig:
    """`config` shrunk to test size, with every choice in it kept.

    All layer kinds are there, and one layer more than fills whole groups of them.
    Query heads stay in proportion to key/value heads, which become 3 where there were
    several. Of many experts 4 are left, 2 for each token. The window (9) and the length
    before RoPE scaling (48) are shorter than 64 tokens, so that a text of 64 shows
    both.
    """
    head_dim, width = 16, 48
    kv_heads = 1 if config.num_kv_heads == 1 else 3
    period = math.lcm(len(config.layer_pattern), len(config.rope_pattern))
    scale = config.attention_scale
    scaling = config.rope_scaling
    if scaling is not None:
        pairs = int(head_dim * config.rope_fraction) // 2
        scaling = dataclasses.replace(
            scaling,
            original_context_length=48,
            short_factors=_spread(scaling.short_factors, pairs),
            long_factors=_spread(scaling.long_factors, pairs),
        )
    return dataclasses.replace(
        config,
        vocab_size=64,
        num_layers=period + 1,
        model_dim=width,
        num_heads=kv_heads * (config.num_heads // config.num_kv_heads),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=80,
        num_experts=min(config.num_experts, 4),
        experts_per_token=min(config.experts_per_token, 2),
        context_length=128,
        window=None if config.window is None else 9,
        rope_scaling=scaling,
        # Both are relative to widths, which change.
        attention_scale=None
        if scale is None
        else scale * math.sqrt(config.head_dim / head_dim),
        embedding_scale=config.embedding_scale * math.sqrt(width / config.model_dim)
        if config.embedding_scale != 1.0
        else 1.0,
        init_std=width**-0.5 if config.position == "sinusoidal" else config.init_std,
    )


def _spread(factors: tuple[float, ...], n: int) -> tuple[float, ...]:
    """n of the factors, from the first to the last."""
    if not factors:
        return ()
    return tuple(factors[round(i * (len(factors) - 1) / (n - 1))] for i in range(n))
