"""Converts a `ModelConfig` to the `config.json` of a Hugging Face family.

It uses the older spelling (`rope_theta` beside `rope_scaling`), which transformers 4
and 5 and other readers of these files all understand.
"""

from collections.abc import Callable, Mapping
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


def _layer_types(config: ModelConfig) -> list[str]:
    """Returns the `layer_types` of all layers."""
    names = {ours: theirs for theirs, ours in LAYER_KINDS.items()}
    kinds = config.layer_pattern
    return [names[kinds[i % len(kinds)]] for i in range(config.num_layers)]


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


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    c = config
    length = c.context_length
    if c.rope_scaling is not None and c.rope_scaling.kind == "dynamic":
        length = c.rope_scaling.original_context_length or length
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.model_dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": _ACTIVATION_NAMES.get(c.activation, "silu"),
        "max_position_embeddings": length,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": _write_scaling(c),
    }


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": c.attention_bias, "mlp_bias": c.feed_forward_bias}
    return {**_write_shared(c), **biases}


def _write_mistral(c: ModelConfig) -> dict[str, Any]:
    return {**_write_shared(c), "sliding_window": c.window}


def _write_mixtral(c: ModelConfig) -> dict[str, Any]:
    return {
        **_write_mistral(c),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
    }


def _write_qwen2(c: ModelConfig) -> dict[str, Any]:
    return {
        **_write_shared(c),
        "use_sliding_window": c.window is not None,
        "sliding_window": c.window,
        "layer_types": _layer_types(c),
    }


def _write_qwen3(c: ModelConfig) -> dict[str, Any]:
    return {**_write_qwen2(c), "attention_bias": c.attention_bias}


def _write_qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    values = _write_qwen3(c)
    del values["layer_types"]  # transformers' class has no such key
    return {
        **values,
        "moe_intermediate_size": c.hidden_dim,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "norm_topk_prob": c.router_normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _write_gemma(c: ModelConfig) -> dict[str, Any]:
    values = {**_write_shared(c), "attention_bias": c.attention_bias}
    values["hidden_activation"] = values["hidden_act"]
    return values


def _write_gemma2(c: ModelConfig) -> dict[str, Any]:
    values = _write_gemma(c)
    del values["hidden_act"]
    scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
    return {
        **values,
        "sliding_window": c.window,
        "layer_types": _layer_types(c),
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": c.attention_soft_cap,
        "final_logit_softcapping": c.final_soft_cap,
    }


def _write_gemma3_text(c: ModelConfig) -> dict[str, Any]:
    return {**_write_gemma2(c), "rope_local_base_freq": c.rope_local_theta}


def _write_phi3(c: ModelConfig) -> dict[str, Any]:
    values = _write_shared(c)
    if c.rope_scaling is not None:
        length = c.rope_scaling.original_context_length or c.context_length
        values["original_max_position_embeddings"] = length
    return {
        **values,
        "sliding_window": c.window,
        "partial_rotary_factor": c.rope_fraction,
    }


def _write_olmo2(c: ModelConfig) -> dict[str, Any]:
    return {**_write_shared(c), "attention_bias": c.attention_bias}


def _write_smollm3(c: ModelConfig) -> dict[str, Any]:
    rotated = [c.rope_pattern[i % len(c.rope_pattern)] for i in range(c.num_layers)]
    return {
        **_write_qwen3(c),
        "mlp_bias": c.feed_forward_bias,
        "no_rope_layers": [int(r) for r in rotated],
    }


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new"}
    return {
        "vocab_size": c.vocab_size,
        "n_positions": c.context_length,
        "n_embd": c.model_dim,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.hidden_dim,
        "activation_function": names.get(c.activation, c.activation),
        "layer_norm_epsilon": c.norm_epsilon,
        "tie_word_embeddings": c.tied_embeddings,
    }


def _write_gpt_neox(c: ModelConfig) -> dict[str, Any]:
    values = _write_shared(c)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        del values[name]
    return {
        **values,
        "layer_norm_eps": c.norm_epsilon,
        "rotary_emb_base": c.rope_theta,
        "rotary_pct": c.rope_fraction,
        "use_parallel_residual": c.parallel_block,
        "attention_bias": c.attention_bias,
    }


def _write_gpt_oss(c: ModelConfig) -> dict[str, Any]:
    return {
        **_write_shared(c),
        "attention_bias": True,
        "sliding_window": c.window,
        "layer_types": _layer_types(c),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "swiglu_limit": 7.0,
    }


# In the order in which families are tried: the plain ones first.
_WRITERS: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "llama": _write_llama,
    "mistral": _write_mistral,
    "qwen2": _write_qwen2,
    "qwen3": _write_qwen3,
    "gemma": _write_gemma,
    "gemma2": _write_gemma2,
    "gemma3_text": _write_gemma3_text,
    "phi3": _write_phi3,
    "olmo2": _write_olmo2,
    "smollm3": _write_smollm3,
    "gpt2": _write_gpt2,
    "gpt_neox": _write_gpt_neox,
    "mixtral": _write_mixtral,
    "qwen3_moe": _write_qwen3_moe,
    "gpt_oss": _write_gpt_oss,
}

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def write(config: ModelConfig) -> dict[str, Any]:
    """Returns the keys of a `config.json`, for the first family that fits the model.

    Raises:
      ValueError: if none fits; names the differences from the nearest family.
    """

    def attempt(model_type: str) -> tuple[dict[str, Any], ModelConfig]:
        values = {"model_type": model_type, **_WRITERS[model_type](config)}
        return values, read(Keys(values, "config.json"))

    attempts = {name: partial(attempt, name) for name in _WRITERS}
    model_type, values = choose(config, attempts, "family of Hugging Face")
    return {"architectures": [_ARCHITECTURES[model_type]], **values}
