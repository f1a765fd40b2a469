"""The tiny models of `parity_case` in Hugging Face transformers, on CPU torch."""

from typing import Any

import numpy as np
import torch
import transformers as hf
from parity_case import tokens, weights

from jaxlm.config import ModelConfig


def rope_parameters(c: ModelConfig) -> dict[str, Any]:
    """Returns the rope_parameters of a transformers model with this config."""
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_fraction != 1.0:
        values["partial_rotary_factor"] = c.rope_fraction
    s = c.rope_scaling
    if s is None:
        return values
    values["rope_type"] = s.kind
    if s.kind != "longrope":
        values["factor"] = s.factor
    if s.kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = s.original_context_length
    if s.kind == "llama3":
        values["low_freq_factor"] = s.low_frequency_factor
        values["high_freq_factor"] = s.high_frequency_factor
    if s.kind == "yarn":
        values |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        values["truncate"] = s.truncate
    if s.kind == "longrope":
        values |= {"short_factor": list(s.short_factors)}
        values |= {"long_factor": list(s.long_factors)}
    return values


def model_config(name: str, c: ModelConfig) -> hf.PreTrainedConfig:
    """Returns the transformers config; `name` starts with the name of the family."""
    if name.startswith("gpt2"):
        return hf.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context_length,
            n_embd=c.model_dim,
            n_layer=c.num_layers,
            n_head=c.num_heads,
            n_inner=c.hidden_dim,
            layer_norm_epsilon=c.norm_epsilon,
        )
    if name.startswith("gpt_neox"):
        return hf.GPTNeoXConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.model_dim,
            intermediate_size=c.hidden_dim,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            max_position_embeddings=c.context_length,
            layer_norm_eps=c.norm_epsilon,
            rope_parameters=rope_parameters(c),
        )
    s = c.rope_scaling
    # Dynamic scaling takes its original length from the context length.
    dynamic = s is not None and s.kind == "dynamic"
    common = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.model_dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=(
            s.original_context_length if dynamic else c.context_length
        ),
        rms_norm_eps=c.norm_epsilon,
        tie_word_embeddings=c.tied_embeddings,
        rope_parameters=rope_parameters(c),
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    if name.startswith("llama") or name.startswith("smollm2"):
        return hf.LlamaConfig(**common)
    if name.startswith("qwen2"):
        return hf.Qwen2Config(**common)
    if c.num_experts:
        common["num_experts_per_tok"] = c.experts_per_token
    if name.startswith("mixtral"):
        return hf.MixtralConfig(**common, num_local_experts=c.num_experts)
    if name.startswith("qwen3") and c.num_experts:
        return hf.Qwen3MoeConfig(
            **common,
            num_experts=c.num_experts,
            moe_intermediate_size=c.hidden_dim,
            norm_topk_prob=c.router_normalize,
        )
    if name.startswith("qwen3"):
        return hf.Qwen3Config(**common)
    if name.startswith("olmo2"):
        return hf.Olmo2Config(**common)
    if name.startswith("mistral"):
        return hf.MistralConfig(**common, sliding_window=c.window)
    if name.startswith("phi"):
        if s is not None:
            common["original_max_position_embeddings"] = s.original_context_length
        return hf.Phi3Config(**common, sliding_window=c.window)
    if name.startswith("smollm3"):
        no_rope = [int(c.rope_pattern[i % 4]) for i in range(c.num_layers)]
        return hf.SmolLM3Config(**common, no_rope_layers=no_rope)
    if name.startswith("gemma-"):
        return hf.GemmaConfig(**common)
    kinds = {"local": "sliding_attention", "global": "full_attention"}
    pattern = [
        kinds[c.layer_pattern[i % len(c.layer_pattern)]] for i in range(c.num_layers)
    ]
    common |= {"sliding_window": c.window, "layer_types": pattern}
    if name.startswith("gpt-oss"):
        return hf.GptOssConfig(**common, num_local_experts=c.num_experts)
    assert c.attention_scale is not None
    common["query_pre_attn_scalar"] = round(c.attention_scale**-2)
    if name.startswith("gemma2"):
        return hf.Gemma2Config(
            **common,
            attn_logit_softcapping=c.attention_soft_cap,
            final_logit_softcapping=c.final_soft_cap,
        )
    assert name.startswith("gemma3"), name
    local = {"rope_type": "default", "rope_theta": c.rope_local_theta}
    common["rope_parameters"] = {
        "full_attention": rope_parameters(c),
        "sliding_attention": local,
    }
    return hf.Gemma3TextConfig(**common)


def _layer(name: str, c: ModelConfig, w: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the tensors of a layer by transformers' names; Linear is (out, in)."""
    N, H, D = c.num_heads, c.head_dim, c.model_dim
    q, k, v = (w[f"attn/{n}"].reshape(D, -1).T for n in "qkv")
    o = w["attn/o"].reshape(N * H, D).T
    if not c.num_experts:
        up, down = w["mlp/up"].T, w["mlp/down"].T
    if name.startswith("gpt2"):
        biases = [w[f"attn/{n}_bias"].reshape(-1) for n in "qkv"]
        return {
            "ln_1.weight": w["attn_norm/scale"],
            "ln_1.bias": w["attn_norm/bias"],
            "ln_2.weight": w["mlp_norm/scale"],
            "ln_2.bias": w["mlp_norm/bias"],
            "attn.c_attn.weight": np.concatenate([q, k, v]).T,
            "attn.c_attn.bias": np.concatenate(biases),
            "attn.c_proj.weight": o.T,
            "attn.c_proj.bias": w["attn/o_bias"],
            "mlp.c_fc.weight": up.T,
            "mlp.c_fc.bias": w["mlp/up_bias"],
            "mlp.c_proj.weight": down.T,
            "mlp.c_proj.bias": w["mlp/down_bias"],
        }
    if name.startswith("gpt_neox"):
        # Fused head by head: q, k, v of head 0, then of head 1 ...
        fused = np.stack([x.reshape(N, H, D) for x in (q, k, v)], 1).reshape(-1, D)
        bias = np.stack([w[f"attn/{n}_bias"] for n in "qkv"], 1).reshape(-1)
        return {
            "input_layernorm.weight": w["attn_norm/scale"],
            "input_layernorm.bias": w["attn_norm/bias"],
            "post_attention_layernorm.weight": w["mlp_norm/scale"],
            "post_attention_layernorm.bias": w["mlp_norm/bias"],
            "attention.query_key_value.weight": fused,
            "attention.query_key_value.bias": bias,
            "attention.dense.weight": o,
            "attention.dense.bias": w["attn/o_bias"],
            "mlp.dense_h_to_4h.weight": up,
            "mlp.dense_h_to_4h.bias": w["mlp/up_bias"],
            "mlp.dense_4h_to_h.weight": down,
            "mlp.dense_4h_to_h.bias": w["mlp/down_bias"],
        }
    out = {"self_attn.o_proj.weight": o}
    if name.startswith("phi"):
        out["self_attn.qkv_proj.weight"] = np.concatenate([q, k, v])
    else:
        projections = zip("qkv", (q, k, v), strict=True)
        out |= {f"self_attn.{n}_proj.weight": x for n, x in projections}
    if name.startswith("gpt-oss"):
        out |= _gpt_oss_experts(w)
        out["self_attn.o_proj.bias"] = w["attn/o_bias"]
        out["self_attn.sinks"] = w["attn/sinks"]
    elif c.num_experts:
        fused = np.concatenate([w["moe/gate"], w["moe/up"]], axis=2)
        out["mlp.gate.weight"] = w["moe/router"].T
        out["mlp.experts.gate_up_proj"] = fused.swapaxes(1, 2)
        out["mlp.experts.down_proj"] = w["moe/down"].swapaxes(1, 2)
    elif name.startswith("phi"):
        out["mlp.gate_up_proj.weight"] = np.concatenate([w["mlp/gate"].T, up])
        out["mlp.down_proj.weight"] = down
    else:
        out |= {"mlp.gate_proj.weight": w["mlp/gate"].T, "mlp.up_proj.weight": up}
        out["mlp.down_proj.weight"] = down
    if c.attention_bias:
        for n in "qkv":
            out[f"self_attn.{n}_proj.bias"] = w[f"attn/{n}_bias"].reshape(-1)
    if c.qk_norm != "none":
        for n in "qk":
            out[f"self_attn.{n}_norm.weight"] = w[f"attn/{n}_norm/scale"].reshape(-1)
    norms = {
        "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
        "output": {
            "attn_output_norm": "post_attention_layernorm",
            "mlp_output_norm": "post_feedforward_layernorm",
        },
        "both": {
            "attn_norm": "input_layernorm",
            "attn_output_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_output_norm": "post_feedforward_layernorm",
        },
    }[c.norm_placement]
    return out | {f"{n}.weight": w[f"{ours}/scale"] for ours, n in norms.items()}


def _gpt_oss_experts(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Alternates the columns of gate and up; these matrices are (in, out)."""

    def alternate(gate, up):
        return np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)

    return {
        "mlp.router.weight": w["moe/router"].T,
        "mlp.router.bias": w["moe/router_bias"],
        "mlp.experts.gate_up_proj": alternate(w["moe/gate"], w["moe/up"]),
        "mlp.experts.gate_up_proj_bias": alternate(
            w["moe/gate_bias"], w["moe/up_bias"]
        ),
        "mlp.experts.down_proj": w["moe/down"],
        "mlp.experts.down_proj_bias": w["moe/down_bias"],
    }


def state_dict(name: str, c: ModelConfig) -> dict[str, torch.Tensor]:
    """Returns `weights(config)` by transformers' names."""
    flat = weights(c)
    if name.startswith("gpt2"):
        top, layers, final = "transformer", "h", "ln_f"
        out = {
            "transformer.wte.weight": flat["embed/table"],
            "transformer.wpe.weight": flat["embed/positions"],
        }
    elif name.startswith("gpt_neox"):
        top, layers, final = "gpt_neox", "layers", "final_layer_norm"
        out = {"gpt_neox.embed_in.weight": flat["embed/table"]}
    else:
        top, layers, final = "model", "layers", "norm"
        out = {"model.embed_tokens.weight": flat["embed/table"]}
    out[f"{top}.{final}.weight"] = flat["final_norm/scale"]
    if "final_norm/bias" in flat:
        out[f"{top}.{final}.bias"] = flat["final_norm/bias"]
    if not c.tied_embeddings:
        out["lm_head.weight"] = flat["lm_head/kernel"].T
    for i in range(c.num_layers):
        layer = {
            path.removeprefix("layers/"): value[i]
            for path, value in flat.items()
            if path.startswith("layers/")
        }
        for key, value in _layer(name, c, layer).items():
            out[f"{top}.{layers}.{i}.{key}"] = value
    return {key: torch.tensor(np.ascontiguousarray(x)) for key, x in out.items()}


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def build(name: str, c: ModelConfig) -> hf.PreTrainedModel:
    """Builds the model in transformers, with `weights(config)`."""
    config = model_config(name, c)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = model.load_state_dict(state_dict(name, c), strict=False)
    tied = {"lm_head.weight"} if c.tied_embeddings else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    return model


def run(model: hf.PreTrainedModel, c: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [T, V] and the residual stream after each layer [L, T, D], f32."""
    hidden: list[torch.Tensor] = []

    def keep(_module, _inputs, output):
        hidden.append(output[0] if isinstance(output, tuple) else output)

    for block in blocks(model):
        block.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(torch.tensor(tokens(c)).long(), use_cache=False).logits
    return logits[0].numpy(), torch.cat(hidden).numpy()
