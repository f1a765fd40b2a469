"""Tiny models that jaxlm and Hugging Face transformers both compute.

Uses neither jax nor torch, so that both sides get the same weights.
"""

import dataclasses
import zlib
from pathlib import Path

import numpy as np

from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.model.presets import preset, toy

GOLDENS = Path(__file__).with_name("goldens.npz")
FILES = Path(__file__).with_name("files.json")
NUM_TOKENS = 64
# Rows of the logits and hidden states that are stored. The last ones are beyond every
# window (9) and beyond the length before RoPE scaling (48).
LOGIT_ROWS = slice(1, NUM_TOKENS, 2)
HIDDEN_ROWS = (10, NUM_TOKENS - 1)


def _scaled(name: str, **scaling) -> ModelConfig:
    scaling = RopeScaling(original_context_length=48, **scaling)
    return dataclasses.replace(toy(preset(name)), rope_scaling=scaling)


CASES: dict[str, ModelConfig] = {
    name: toy(preset(name))
    for name in (
        "llama2-7b",
        "llama3.1-8b",
        "qwen2-0.5b",
        "qwen3-0.6b",
        "gemma-2b",
        "gemma2-27b",
        "gemma3-27b",
        "mistral-7b-v0.1",
        "phi3-mini-128k",
        "phi4-mini",
        "olmo2-32b",
        "smollm3-3b",
        "gpt2-124m",
        "mixtral-8x7b",
        "qwen3-30b-a3b",
        "gpt-oss-20b",
    )
}
# transformers expects LongRoPE factors for heads of model_dim / num_heads.
CASES["phi4-mini"] = dataclasses.replace(CASES["phi4-mini"], model_dim=9 * 16)
CASES["qwen3-yarn"] = _scaled("qwen3-0.6b", kind="yarn", factor=4.0)
CASES["llama-dynamic"] = dataclasses.replace(
    _scaled("llama2-7b", kind="dynamic", factor=2.0), context_length=96
)
# As in Qwen1.5-MoE and OLMoE.
CASES["qwen3-moe-shares"] = dataclasses.replace(
    CASES["qwen3-30b-a3b"], router_normalize=False
)
# A family without a preset: parallel block, exact GELU, RoPE on a quarter of a head.
CASES["gpt_neox"] = dataclasses.replace(
    CASES["gpt2-124m"],
    position="rope",
    rope_fraction=0.25,
    activation="gelu",
    parallel_block=True,
    tied_embeddings=False,
)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns shapes by path, written independently of jaxlm's table of weights."""
    c = config
    D, N, K, H = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
    F, V, L = c.hidden_dim, c.vocab_size, c.num_layers
    shapes = {"embed/table": (V, D)}
    if c.position == "learned":
        shapes["embed/positions"] = (c.context_length, D)
    layer = {"attn/q": (D, N, H), "attn/k": (D, K, H), "attn/v": (D, K, H)}
    layer["attn/o"] = (N, H, D)
    if c.attention_bias:
        layer |= {"attn/q_bias": (N, H), "attn/k_bias": (K, H), "attn/v_bias": (K, H)}
    if c.attention_output_bias:
        layer["attn/o_bias"] = (D,)
    if c.qk_norm == "head":
        layer |= {"attn/q_norm/scale": (H,), "attn/k_norm/scale": (H,)}
    if c.qk_norm == "full":
        layer |= {"attn/q_norm/scale": (N, H), "attn/k_norm/scale": (K, H)}
    if c.attention_sinks:
        layer["attn/sinks"] = (N,)
    E = c.num_experts
    mlp, experts = ("moe", (E,)) if E else ("mlp", ())
    layer |= {f"{mlp}/up": (*experts, D, F), f"{mlp}/down": (*experts, F, D)}
    if c.gated:
        layer[f"{mlp}/gate"] = (*experts, D, F)
    if c.feed_forward_bias:
        layer |= {f"{mlp}/up_bias": (*experts, F), f"{mlp}/down_bias": (*experts, D)}
        if c.gated:
            layer[f"{mlp}/gate_bias"] = (*experts, F)
    if E:
        layer["moe/router"] = (D, E)
    if c.router_bias:
        layer["moe/router_bias"] = (E,)
    norms = {
        "pre": ["attn_norm", "mlp_norm"],
        "post": ["attn_norm", "mlp_norm"],
        "output": ["attn_output_norm", "mlp_output_norm"],
        "both": ["attn_norm", "mlp_norm", "attn_output_norm", "mlp_output_norm"],
    }[c.norm_placement]
    parts = ["scale", "bias"] if c.norm_bias else ["scale"]
    layer |= {f"{norm}/{part}": (D,) for norm in norms for part in parts}
    if c.norm_bias and c.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            layer[f"attn/{name}/bias"] = layer[f"attn/{name}/scale"]
    shapes |= {f"layers/{name}": (L, *shape) for name, shape in layer.items()}
    if c.final_norm:
        shapes |= {f"final_norm/{part}": (D,) for part in parts}
    if not c.tied_embeddings:
        shapes["lm_head/kernel"] = (D, V)
    return shapes


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns f32 weights by path, much larger than those of `init`, to expose bugs."""
    values = {}
    for name, shape in parameter_shapes(config).items():
        draw = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if name.endswith("norm/scale"):
            center = 0.0 if config.norm == "rms_unit_offset" else 1.0
            draw = center + 0.3 * draw
        else:
            draw = 0.2 * draw
        if config.activation == "swiglu_clamped" and name.endswith(("/gate", "/up")):
            draw *= 4  # so that many values are clamped
        values[name] = draw.astype(np.float32)
    return values


def tokens(config: ModelConfig) -> np.ndarray:
    """Returns token ids [1, 64], int32."""
    draw = np.random.default_rng(7).integers(0, config.vocab_size, (1, NUM_TOKENS))
    return draw.astype(np.int32)


def nested(flat: dict[str, np.ndarray]) -> dict:
    """`a/b` paths as a nested dict."""
    tree: dict = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
