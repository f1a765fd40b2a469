"""Converts the `config.json` of Hugging Face models to a `ModelConfig`.

Reading is strict: each key is mapped, or is listed as one that does not change what the
model computes, or is an error. A silently ignored `rope_scaling` would be a bug that
nobody sees. Absent keys have the defaults of transformers' classes. `hf_fields.py`
reads what families have in common.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.checkpoint.hf import hf_fields
from jaxlm.checkpoint.keys import MAX_COUNT, MAX_LAYERS, Keys
from jaxlm.config import ModelConfig
from jaxlm.terminal.printable import shown_value

# Keys that do not affect the logits: names, training, saving, generation, and code that
# is never executed.
_NO_EFFECT = """
_attn_implementation _attn_implementation_autoset _name_or_path architectures
attention_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
hidden_dropout id2label initial_context_length initializer_range label2id
length_penalty max_length min_length model_type n_ctx no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
remove_invalid_values reorder_and_upcast_attn repetition_penalty
resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef sep_token_id
summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
transformers.js_config transformers_version typical_p unk_token_id use_bfloat16
use_cache
"""
# Keys that must have one of these values, which mean "not used".
_UNUSED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "embedding_size": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "is_llama_config": (True,),
    "mlp_only_layers": ([], None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "router_jitter_noise": (0, 0.0, None),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
    "attention_chunk_size": (None,),
}


def _read_llama(keys: Keys) -> ModelConfig:
    """Reads Llama 1 to 3, SmolLM2 and other models of type llama."""
    return ModelConfig(
        **hf_fields.shared(keys, max_position_embeddings=2048),
        **hf_fields.attention_biases(keys),
        feed_forward_bias=keys.flag("mlp_bias", False),
    )


def _read_mistral(keys: Keys) -> ModelConfig:
    shared = hf_fields.shared(
        keys, num_key_value_heads=8, max_position_embeddings=131_072
    )
    return ModelConfig(**shared, **hf_fields.windows(keys, shared, 4096))


def _read_mixtral(keys: Keys) -> ModelConfig:
    shared = hf_fields.shared(
        keys,
        1e6,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
    )
    return ModelConfig(
        **shared,
        **hf_fields.windows(keys, shared),
        num_experts=keys.count("num_local_experts", 8),
        experts_per_token=keys.count("num_experts_per_tok", 2),
    )


def _qwen(keys: Keys, head_dim: int | None = None) -> dict[str, Any]:
    shared = hf_fields.shared(keys, max_position_embeddings=32_768, head_dim=head_dim)
    # `use_sliding_window` false disables `sliding_window`.
    used = keys.flag("use_sliding_window", False)
    first = keys.index("max_window_layers", 28)
    windows = hf_fields.windows(keys, shared, 4096, lambda i: i >= first, used)
    return {**shared, **windows}


def _read_qwen2(keys: Keys) -> ModelConfig:
    """Reads Qwen2 and Qwen2.5."""
    return ModelConfig(**_qwen(keys), attention_bias=True)


def _read_qwen3(keys: Keys) -> ModelConfig:
    biases = hf_fields.attention_biases(keys)
    return ModelConfig(**_qwen(keys, head_dim=128), **biases, qk_norm="head")


def _read_qwen3_moe(keys: Keys) -> ModelConfig:
    keys.must("decoder_sparse_step", 1)
    # transformers 5 writes `num_local_experts`.
    experts = keys.count("num_experts", keys.count("num_local_experts", 128))
    # The file's `intermediate_size` is for dense layers.
    keys.put("intermediate_size", keys.count("moe_intermediate_size", 768))
    return ModelConfig(
        # Without a head_dim, transformers divides the width by the heads, unlike for
        # Qwen3.
        **_qwen(keys),
        **hf_fields.attention_biases(keys),
        qk_norm="head",
        num_experts=experts,
        experts_per_token=keys.count("num_experts_per_tok", 8),
        router_normalize=keys.flag("norm_topk_prob", False),
    )


def _gemma(keys: Keys, theta: float = 10_000.0, **defaults: Any) -> dict[str, Any]:
    defaults = {
        "vocab_size": 256_000,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        **defaults,
    }
    # The newer name wins: the older one is then a leftover of Gemma 1.
    activation = keys.take("hidden_activation", keys.peek("hidden_act"))
    if activation == "gelu":
        # In Gemma 1's files this means the tanh approximation, as transformers notes.
        activation = "gelu_pytorch_tanh"
    keys.put("hidden_act", activation)
    shared = hf_fields.shared(keys, theta, **defaults)
    return {
        **shared,
        **hf_fields.attention_biases(keys),
        "norm": "rms_unit_offset",
        "embedding_scale": math.sqrt(shared["model_dim"]),
    }


def _read_gemma(keys: Keys) -> ModelConfig:
    return ModelConfig(**_gemma(keys))


def _read_gemma2(keys: Keys) -> ModelConfig:
    fields = _gemma(keys)
    keys.drop("cache_implementation")
    return ModelConfig(
        **fields,
        **hf_fields.windows(keys, fields, 4096, lambda i: i % 2 == 0),
        **_gemma_scores(keys, 50.0, 30.0),
        norm_placement="both",
    )


def _gemma_scores(keys: Keys, cap: float | None, final: float | None) -> dict[str, Any]:
    """Reads the attention scale and the soft caps, with defaults for the caps."""
    return {
        "attention_scale": keys.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_soft_cap": hf_fields.soft_cap(keys, "attn_logit_softcapping", cap),
        "final_soft_cap": hf_fields.soft_cap(keys, "final_logit_softcapping", final),
    }


def _read_gemma3_text(keys: Keys) -> ModelConfig:
    """Reads Gemma 3's text model, which is also part of the multimodal files."""
    nested = keys.section("rope_parameters")
    local, whole = nested.section("sliding_attention"), nested.values("full_attention")
    nested.done()
    keys.put("rope_parameters", whole)
    local_theta = local.number("rope_theta", keys.number("rope_local_base_freq", 1e4))
    local.must("rope_type", "default")
    local.done()
    fields = _gemma(
        keys,
        1e6,
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
    )
    keys.drop("cache_implementation", "_sliding_window_pattern")
    every = keys.count("sliding_window_pattern", 6)
    return ModelConfig(
        **fields,
        **hf_fields.windows(keys, fields, 4096, lambda i: (i + 1) % every != 0),
        **_gemma_scores(keys, None, None),
        rope_local_theta=local_theta,
        qk_norm="head",
        norm_placement="both",
    )


def _read_gemma3(keys: Keys) -> ModelConfig:
    """Reads the text part of a multimodal Gemma 3."""
    keys.drop("vision_config", "mm_tokens_per_image", "image_token_index")
    keys.drop("image_token_id", "boi_token_index", "eoi_token_index")
    keys.must("tie_word_embeddings", True)
    text = keys.section("text_config")
    # Otherwise it could be another multimodal model, and so on.
    if (kind := text.peek("model_type")) != "gemma3_text":
        raise ValueError(
            f"{text.where}: model_type is {shown_value(kind)}, not 'gemma3_text'"
        )
    return read(text)


def _read_phi3(keys: Keys) -> ModelConfig:
    """Reads Phi-3, Phi-4 and Phi-4-mini."""
    shared = hf_fields.shared(keys, max_position_embeddings=4096, rms_norm_eps=1e-5)
    # The last three are names from the code beside these files, for the same
    # properties.
    for name in ("attention_bias", "lm_head_bias", "mlp_bias"):
        keys.must(name, False)
    keys.must("full_attn_mod", 1)
    keys.drop("interpolate_factor", "embd_layer")
    return ModelConfig(**shared, **hf_fields.windows(keys, shared))


def _read_olmo2(keys: Keys) -> ModelConfig:
    return ModelConfig(
        **hf_fields.shared(keys, max_position_embeddings=2048, rms_norm_eps=1e-5),
        **hf_fields.attention_biases(keys),
        qk_norm="full",
        norm_placement="output",
    )


def _read_smollm3(keys: Keys) -> ModelConfig:
    shared = hf_fields.shared(
        keys,
        2e6,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    layers = shared["num_layers"]
    every = keys.count("no_rope_layer_interval", 4)
    otherwise = [int((i + 1) % every != 0) for i in range(layers)]
    # 1 marks a layer with RoPE, despite the name.
    rotated = keys.items("no_rope_layers", int, otherwise)
    if len(rotated) < layers:
        raise ValueError(
            f"{keys.where}: no_rope_layers has {len(rotated)} entries for {layers} "
            "layers"
        )
    used = keys.flag("use_sliding_window", False)
    keys.drop("max_window_layers")
    return ModelConfig(
        **shared,
        **hf_fields.windows(keys, shared, None, lambda i: not rotated[i], used),
        **hf_fields.attention_biases(keys),
        feed_forward_bias=keys.flag("mlp_bias", False),
        rope_pattern=hf_fields.period([bool(r) for r in rotated[:layers]]),
    )


def _read_gpt2(keys: Keys) -> ModelConfig:
    width, heads = keys.count("n_embd", 768), keys.count("n_head", 12)
    if width % heads:
        raise ValueError(
            f"{keys.where}: n_embd {width} is not a multiple of n_head {heads}"
        )
    return ModelConfig(
        vocab_size=keys.count("vocab_size", 50_257),
        num_layers=keys.count("n_layer", 12, MAX_LAYERS),
        model_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        hidden_dim=keys.count("n_inner", 4 * width),
        context_length=keys.count("n_positions", 1024),
        position="learned",
        attention_bias=True,
        attention_output_bias=True,
        activation=keys.choice(
            "activation_function", hf_fields.ACTIVATIONS, "gelu_new"
        ),
        gated=False,
        feed_forward_bias=True,
        norm="layer",
        norm_bias=True,
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
        tied_embeddings=keys.flag("tie_word_embeddings", True),
    )


def _read_gpt_neox(keys: Keys) -> ModelConfig:
    """Reads GPT-NeoX and Pythia."""
    # GPT-NeoX's names for what `hf_fields.shared` reads.
    theta = keys.number("rotary_emb_base", 10_000.0)
    fraction = keys.number("rotary_pct", 0.25)
    if "partial_rotary_factor" not in keys:
        keys.put("partial_rotary_factor", fraction)
    bias = keys.flag("attention_bias", True)
    shared = hf_fields.shared(
        keys, theta, max_position_embeddings=2048, hidden_act="gelu"
    )
    shared["norm_epsilon"] = keys.number("layer_norm_eps", 1e-5)
    return ModelConfig(
        **shared,
        attention_bias=bias,
        attention_output_bias=bias,
        gated=False,
        feed_forward_bias=True,
        norm="layer",
        norm_bias=True,
        parallel_block=keys.flag("use_parallel_residual", True),
    )


_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_gpt_oss(keys: Keys) -> ModelConfig:
    quantization = keys.section("quantization_config")
    quantization.must("quant_method", "mxfp4")
    # gpt-oss has two names for the number of experts of a token.
    used = keys.count("experts_per_token", keys.count("num_experts_per_tok", 4))
    keys.must("swiglu_limit", 7, 7.0)
    keys.must("swiglu_alpha", 1.702)
    keys.must("attention_bias", True)
    keys.must("hidden_act", "silu")
    shared = hf_fields.shared(
        keys,
        150_000.0,
        _GPT_OSS_ROPE,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
    )
    shared["activation"] = "swiglu_clamped"
    return ModelConfig(
        **shared,
        **hf_fields.windows(keys, shared, 128, lambda i: i % 2 == 0),
        attention_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        feed_forward_bias=True,
        num_experts=keys.count("num_local_experts", 128),
        experts_per_token=used,
        router_bias=True,
    )


_READERS: Mapping[str, Callable[[Keys], ModelConfig]] = {
    "llama": _read_llama,
    "mistral": _read_mistral,
    "mixtral": _read_mixtral,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "qwen3_moe": _read_qwen3_moe,
    "gemma": _read_gemma,
    "gemma2": _read_gemma2,
    "gemma3_text": _read_gemma3_text,
    "gemma3": _read_gemma3,
    "phi3": _read_phi3,
    "olmo2": _read_olmo2,
    "smollm3": _read_smollm3,
    "gpt2": _read_gpt2,
    "gpt_neox": _read_gpt_neox,
    "gpt_oss": _read_gpt_oss,
}


def read(keys: Keys) -> ModelConfig:
    """Returns the config of the model that the keys describe.

    Raises:
      ValueError: for an unknown model_type, a missing or impossible value, and a key
        that is neither mapped nor known to have no effect.
    """
    reader = keys.choice("model_type", _READERS, "")
    try:
        config = reader(keys)
    except ValueError as error:
        known = str(error).startswith(keys.where)
        raise ValueError(f"{'' if known else keys.where + ': '}{error}") from None
    for name, allowed in _UNUSED.items():
        keys.must(name, *allowed)
    keys.done(_NO_EFFECT.split())
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        # The file has the length before scaling.
        scaled = int(config.context_length * scaling.factor)
        if scaled > MAX_COUNT:
            raise ValueError(
                f"{keys.where}: rope_scaling: factor {scaling.factor} makes a context "
                f"of {scaled} tokens: at most {MAX_COUNT} are possible"
            )
        config = dataclasses.replace(config, context_length=scaled)
    return config
