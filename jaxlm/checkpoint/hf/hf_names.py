"""Names and layouts of the tensors in Hugging Face files, by family."""

from collections.abc import Mapping

from jaxlm.checkpoint.tensor_mapping import QKV, Rule, linear, rule

_L = "model.layers.{layer}."
_QKV = [path for path, _ in QKV]
_GATE_UP = ("layers/mlp/gate", "layers/mlp/up")

# Norms of a block: our name -> theirs, by norm placement.
_PRE = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_OUTPUT = {
    "attn_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_BOTH = {
    **_OUTPUT,
    "attn_norm": "input_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
}

_TOP = (
    rule("model.embed_tokens.weight", "embed/table", "V D -> V D"),
    rule("model.norm.weight", "final_norm/scale", "D -> D"),
    rule("lm_head.weight", "lm_head/kernel", "V D -> D V"),
)
_OUT = linear((_L + "self_attn.o_proj", "layers/attn/o", "D (N H) -> N H D"))
_ATTENTION = (
    *linear(
        (_L + "self_attn.q_proj", "layers/attn/q", "(N H) D -> D N H"),
        (_L + "self_attn.k_proj", "layers/attn/k", "(K H) D -> D K H"),
        (_L + "self_attn.v_proj", "layers/attn/v", "(K H) D -> D K H"),
    ),
    *_OUT,
)
_MLP = linear(
    (_L + "mlp.gate_proj", "layers/mlp/gate", "F D -> D F"),
    (_L + "mlp.up_proj", "layers/mlp/up", "F D -> D F"),
    (_L + "mlp.down_proj", "layers/mlp/down", "D F -> F D"),
)
_QK_NORM_HEAD = (
    rule(_L + "self_attn.q_norm.weight", "layers/attn/q_norm/scale", "H -> H"),
    rule(_L + "self_attn.k_norm.weight", "layers/attn/k_norm/scale", "H -> H"),
)
_QK_NORM_FULL = (
    rule(_L + "self_attn.q_norm.weight", "layers/attn/q_norm/scale", "(N H) -> N H"),
    rule(_L + "self_attn.k_norm.weight", "layers/attn/k_norm/scale", "(K H) -> K H"),
)


def _norms(names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(
        rule(f"{_L}{theirs}.weight", f"layers/{ours}/scale", "D -> D")
        for ours, theirs in names.items()
    )


_LLAMA = (*_TOP, *_ATTENTION, *_MLP, *_norms(_PRE))
_GEMMA2 = (*_TOP, *_ATTENTION, *_MLP, *_norms(_BOTH))

_PHI3 = (
    *_TOP,
    *_OUT,
    *_norms(_PRE),
    Rule(_L + "self_attn.qkv_proj.weight", QKV),
    rule(_L + "mlp.gate_up_proj.weight", _GATE_UP, "(j F) D -> D F"),
    rule(_L + "mlp.down_proj.weight", "layers/mlp/down", "D F -> F D"),
)


def _experts(moe: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    expert = f"{_L}{moe}.experts.{{expert}}"
    return (
        rule(f"{_L}{moe}.gate.weight", "layers/moe/router", "E D -> D E"),
        rule(f"{expert}.{gate}.weight", "layers/moe/gate", "F D -> D F"),
        rule(f"{expert}.{up}.weight", "layers/moe/up", "F D -> D F"),
        rule(f"{expert}.{down}.weight", "layers/moe/down", "D F -> F D"),
    )


_MIXTRAL = _experts("block_sparse_moe", "w1", "w3", "w2")
_QWEN3_MOE = _experts("mlp", "gate_proj", "up_proj", "down_proj")

# All experts in one tensor, (in, out); columns of gate and up alternate.
_GPT_OSS = (
    rule(_L + "mlp.router.weight", "layers/moe/router", "E D -> D E"),
    rule(_L + "mlp.router.bias", "layers/moe/router_bias", "E -> E"),
    rule(
        _L + "mlp.experts.gate_up_proj",
        ("layers/moe/gate", "layers/moe/up"),
        "E D (F j) -> E D F",
    ),
    rule(
        _L + "mlp.experts.gate_up_proj_bias",
        ("layers/moe/gate_bias", "layers/moe/up_bias"),
        "E (F j) -> E F",
    ),
    rule(_L + "mlp.experts.down_proj", "layers/moe/down", "E F D -> E F D"),
    rule(_L + "mlp.experts.down_proj_bias", "layers/moe/down_bias", "E D -> E D"),
    rule(_L + "self_attn.sinks", "layers/attn/sinks", "N -> N"),
)

_H = "transformer.h.{layer}."


def _with_bias(name: str, path: str) -> tuple[Rule, ...]:
    """Weight and bias of a LayerNorm."""
    return (
        rule(f"{name}.weight", f"{path}/scale", "D -> D"),
        rule(f"{name}.bias", f"{path}/bias", "D -> D"),
    )


# Conv1D: weights are (in, out).
_GPT2 = (
    rule("transformer.wte.weight", "embed/table", "V D -> V D"),
    rule("transformer.wpe.weight", "embed/positions", "C D -> C D"),
    *_with_bias("transformer.ln_f", "final_norm"),
    rule("lm_head.weight", "lm_head/kernel", "V D -> D V"),
    *_with_bias(_H + "ln_1", "layers/attn_norm"),
    *_with_bias(_H + "ln_2", "layers/mlp_norm"),
    *linear((_H + "attn.c_attn", _QKV, "D (j N H) -> D N H")),
    *linear((_H + "attn.c_proj", "layers/attn/o", "(N H) D -> N H D")),
    *linear((_H + "mlp.c_fc", "layers/mlp/up", "D F -> D F")),
    *linear((_H + "mlp.c_proj", "layers/mlp/down", "F D -> F D")),
)

_X = "gpt_neox.layers.{layer}."
# q, k and v of head 0, then of head 1 ...
_GPT_NEOX = (
    rule("gpt_neox.embed_in.weight", "embed/table", "V D -> V D"),
    *_with_bias("gpt_neox.final_layer_norm", "final_norm"),
    rule("embed_out.weight", "lm_head/kernel", "V D -> D V"),
    *_with_bias(_X + "input_layernorm", "layers/attn_norm"),
    *_with_bias(_X + "post_attention_layernorm", "layers/mlp_norm"),
    *linear((_X + "attention.query_key_value", _QKV, "(N j H) D -> D N H")),
    *linear((_X + "attention.dense", "layers/attn/o", "D (N H) -> N H D")),
    *linear((_X + "mlp.dense_h_to_4h", "layers/mlp/up", "F D -> D F")),
    *linear((_X + "mlp.dense_4h_to_h", "layers/mlp/down", "D F -> F D")),
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "smollm3"), _LLAMA),
    "qwen3": (*_LLAMA, *_QK_NORM_HEAD),
    "gemma2": _GEMMA2,
    "gemma3_text": (*_GEMMA2, *_QK_NORM_HEAD),
    "gemma3": (*_GEMMA2, *_QK_NORM_HEAD),
    "phi3": _PHI3,
    "olmo2": (*_TOP, *_ATTENTION, *_MLP, *_norms(_OUTPUT), *_QK_NORM_FULL),
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "mixtral": (*_TOP, *_ATTENTION, *_norms(_PRE), *_MIXTRAL),
    "qwen3_moe": (*_TOP, *_ATTENTION, *_norms(_PRE), *_QK_NORM_HEAD, *_QWEN3_MOE),
    "gpt_oss": (*_TOP, *_ATTENTION, *_norms(_PRE), *_GPT_OSS),
}

# Alternative names of the same tensors in some files: (pattern, replacement).
RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    # OpenAI's files lack the prefix.
    "gpt2": ((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
    # The text model inside a multimodal one: before and since transformers 4.52.
    "gemma3": (
        (r"^language_model\.model\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^model\.language_model\.", "model."),
    ),
}

# Tensors that may be present but are not used: regular expressions for full names.
_BUFFERS = (r".*\.rotary_emb\.inv_freq", r".*\.attn(ention)?\.(masked_)?bias")
_OTHER_PARTS = r"(model\.)?(vision_tower|multi_modal_projector)\..*"


def unused(model_type: str) -> tuple[str, ...]:
    """Returns patterns for tensors that are recomputed, or belong to other parts."""
    return (*_BUFFERS, _OTHER_PARTS) if model_type == "gemma3" else _BUFFERS
