"""Converts a `ModelConfig` to the `config.json` of a Hugging Face family.

It uses the older spelling (`rope_theta` beside `rope_scaling`), which transformers 4
and 5 and other readers of these files all understand.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxlm.checkpoint.families import choose
from jaxlm.checkpoint.hf.hf_config import read
from jaxlm.checkpoint.hf.hf_fields import LAYER_KINDS
from jaxlm.checkpoint.keys import Keys
from jaxlm.config import ModelConfig

_ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu_squared": "relu2",
}


def _write_scaling(config: ModelConfig) -> dict[str, Any] | None:
    s = config.rope_scaling
    if s is None:
        return None
    values: dict[str, Any] = {"rope_type": s.kind}
    if s.kind != "longrope":
        values["factor"] = s.factor
    if s.kind in ("llama3", "yarn"):
        length = s.original_context_length or config.context_length
        values["original_max_position_embeddings"] = length
    if s.kind == "llama3":
        values["low_freq_factor"] = s.low_frequency_factor
        values["high_freq_factor"] = s.high_frequency_factor
    if s.kind == "yarn":
        values |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        values["truncate"] = s.truncate
    if s.attention_factor is not None:
        values["attention_factor"] = s.attention_factor
    if s.kind == "longrope":
        values["short_factor"] = list(s.short_factors)
        values["long_factor"] = list(s.long_factors)
    return values


def _values(c: ModelConfig) -> dict[str, Any]:
    """Returns the keys of all families; `_FAMILIES` has those of each."""
    scaling = c.rope_scaling
    length = original = c.context_length
    if scaling is not None:
        original = scaling.original_context_length or length
        if scaling.kind == "dynamic":
            length = original
    scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
    kinds = {ours: theirs for theirs, ours in LAYER_KINDS.items()}
    layers = range(c.num_layers)
    layer_types = [kinds[c.layer_pattern[i % len(c.layer_pattern)]] for i in layers]
    rotated = [int(c.rope_pattern[i % len(c.rope_pattern)]) for i in layers]
    activation = _ACTIVATION_NAMES.get(c.activation, "silu")
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.model_dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": activation,
        "hidden_activation": activation,
        "max_position_embeddings": length,
        "rms_norm_eps": c.norm_epsilon,
        "layer_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": _write_scaling(c),
        "rope_local_base_freq": c.rope_local_theta,
        "rotary_emb_base": c.rope_theta,
        "rotary_pct": c.rope_fraction,
        "partial_rotary_factor": c.rope_fraction,
        "original_max_position_embeddings": original,
        "no_rope_layers": rotated,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.feed_forward_bias,
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
        "layer_types": layer_types,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": c.attention_soft_cap,
        "final_logit_softcapping": c.final_soft_cap,
        "use_parallel_residual": c.parallel_block,
        "num_local_experts": c.num_experts,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "moe_intermediate_size": c.hidden_dim,
        "norm_topk_prob": c.router_normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "swiglu_limit": 7.0,
        "n_positions": c.context_length,
        "n_embd": c.model_dim,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.hidden_dim,
        "activation_function": (
            "gelu_new" if c.activation == "gelu_tanh" else c.activation
        ),
        "layer_norm_epsilon": c.norm_epsilon,
    }


_SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads"""
_HEADS = "num_key_value_heads head_dim"
_LENGTH = "max_position_embeddings"
_REST = "rms_norm_eps tie_word_embeddings rope_theta rope_scaling"
_LLAMA = f"{_SIZES} {_HEADS} hidden_act {_LENGTH} {_REST}"
_MISTRAL = f"{_LLAMA} sliding_window"
_QWEN2 = f"{_LLAMA} use_sliding_window sliding_window layer_types"
_QWEN3_MOE = f"{_LLAMA} use_sliding_window sliding_window attention_bias"
_GEMMA2 = f"""{_SIZES} {_HEADS} {_LENGTH} {_REST} attention_bias hidden_activation
    sliding_window layer_types query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping"""
_EXPERTS = "num_local_experts num_experts_per_tok"

# Architecture and keys, in the order in which families are tried: plain ones first.
_FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", f"{_LLAMA} attention_bias mlp_bias"),
    "mistral": ("MistralForCausalLM", _MISTRAL),
    "qwen2": ("Qwen2ForCausalLM", _QWEN2),
    "qwen3": ("Qwen3ForCausalLM", f"{_QWEN2} attention_bias"),
    "gemma": ("GemmaForCausalLM", f"{_LLAMA} attention_bias hidden_activation"),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA2),
    "gemma3_text": ("Gemma3ForCausalLM", f"{_GEMMA2} rope_local_base_freq"),
    "phi3": (
        "Phi3ForCausalLM",
        f"{_LLAMA} original_max_position_embeddings sliding_window "
        "partial_rotary_factor",
    ),
    "olmo2": ("Olmo2ForCausalLM", f"{_LLAMA} attention_bias"),
    "smollm3": (
        "SmolLM3ForCausalLM",
        f"{_QWEN2} attention_bias mlp_bias no_rope_layers",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "vocab_size n_positions n_embd n_layer n_head n_inner activation_function "
        "layer_norm_epsilon tie_word_embeddings",
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        f"{_SIZES} hidden_act {_LENGTH} tie_word_embeddings rope_scaling "
        "layer_norm_eps rotary_emb_base rotary_pct use_parallel_residual "
        "attention_bias",
    ),
    "mixtral": ("MixtralForCausalLM", f"{_MISTRAL} {_EXPERTS}"),
    # transformers' class has no layer_types.
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        f"{_QWEN3_MOE} moe_intermediate_size num_experts num_experts_per_tok "
        "norm_topk_prob decoder_sparse_step mlp_only_layers",
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        f"{_LLAMA} attention_bias sliding_window layer_types {_EXPERTS} swiglu_limit",
    ),
}


def write(config: ModelConfig) -> tuple[dict[str, Any], float]:
    """Returns the keys of a `config.json`, for the first family that fits the model.

    The second value is the factor of the file's table of embeddings.

    Raises:
      ValueError: if none fits; names the differences from the nearest family.
    """
    every = _values(config)

    def attempt(model_type: str) -> tuple[dict[str, Any], ModelConfig]:
        architecture, names = _FAMILIES[model_type]
        values = {"architectures": [architecture], "model_type": model_type}
        values |= {name: every[name] for name in names.split()}
        if config.rope_scaling is None:
            values.pop("original_max_position_embeddings", None)
        if model_type == "gpt_oss":
            values["attention_bias"] = True  # the only one that its reader accepts
        return values, read(Keys(values, "config.json"))

    attempts = {name: partial(attempt, name) for name in _FAMILIES}
    _, values, table_factor = choose(config, attempts, "family of Hugging Face")
    return values, table_factor
