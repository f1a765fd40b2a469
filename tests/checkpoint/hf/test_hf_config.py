"""config.json: every key is mapped, known to have no effect, or an error."""

import dataclasses
import json

import pytest

from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.hf import hf_config, hf_config_writing
from jaxlm.checkpoint.keys import Keys
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.fields import diff
from jaxlm.model.presets import PRESETS, preset

# From repositories on the Hugging Face Hub; only lists of factors are shortened.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# Nearly everything is left to the defaults of the class.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
MISTRAL_V0_1 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def read(values, **changes) -> ModelConfig:
    return hf_config.read(Keys({**values, **changes}, "config.json"))


@pytest.mark.parametrize(
    "name, values",
    [
        ("llama3.2-1b", LLAMA_3_2_1B),
        ("qwen2.5-7b", QWEN_2_5_7B),
        ("gemma3-4b", GEMMA_3_4B),
        ("mistral-7b-v0.1", MISTRAL_V0_1),
        ("gpt2-124m", GPT2),
    ],
)
def test_published_files_give_the_presets(name, values):
    """The presets were written independently, from papers and other files."""
    assert not diff(preset(name), read(values), ignore=NOT_KEPT)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_but_one_is_of_a_family(name):
    """The config that is written reads back as the same model: `write` checks this."""
    config = PRESETS[name]
    if name.startswith("transformer"):
        with pytest.raises(ValueError, match=r"the nearest, .*, differs in .*position"):
            hf_config_writing.write(config)
        return
    values = json.loads(json.dumps(hf_config_writing.write(config)[0]))
    assert values["architectures"]
    if config.rope_scaling is None:  # defaults are spelled out in scalings
        assert not diff(config, read(values), ignore=NOT_KEPT)


ROPE = {
    "linear": ({"factor": 2.0}, RopeScaling(kind="linear", factor=2.0)),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 32_768},
        RopeScaling(kind="yarn", factor=4.0, original_context_length=32_768),
    ),
}


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_scalings_in_the_older_and_the_newer_spelling(kind, name, place):
    values, scaling = ROPE[kind]
    rope = {name: kind, **values}
    if place == "rope_parameters":
        rope["rope_theta"] = 1e6
    config = read(QWEN_2_5_7B, **{place: rope})
    assert config.rope_theta == 1e6 and config.rope_scaling == scaling


def test_dynamic_scaling_lengthens_the_context():
    rope = {"type": "dynamic", "factor": 4.0}
    config = read(LLAMA_3_2_1B, rope_scaling=rope, max_position_embeddings=2048)
    assert config.context_length == 8192
    assert config.rope_scaling.original_context_length == 2048


def test_use_sliding_window_false_wins_over_a_window():
    small = {**QWEN_2_5_7B, "sliding_window": 4096}
    assert read(small).window is None
    used = read(small, use_sliding_window=True, max_window_layers=14)
    assert used.window == 4096
    assert used.layer_pattern == ("global",) * 14 + ("local",) * 14


def test_null_is_none_where_an_absent_key_has_a_default():
    gemma2, _ = hf_config_writing.write(preset("gemma2-2b"))
    assert read(gemma2).attention_soft_cap == 50.0
    assert read(gemma2, attn_logit_softcapping=None).attention_soft_cap is None
    assert read(gemma2, final_logit_softcapping=None).final_soft_cap is None
    assert read(gemma2, sliding_window=None).window is None
    absent = {k: v for k, v in gemma2.items() if "softcapping" not in k}
    assert read(absent) == read(gemma2)


def test_code_beside_a_config_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "modeling_llama.py").write_text("raise SystemExit('it was run')")
    auto_map = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    assert read(LLAMA_3_2_1B, auto_map=auto_map) == read(LLAMA_3_2_1B)


WRONG = {
    "an unknown key": ({"attention_sharpness": 2}, "does not know attention_sharpness"),
    "an unknown key of a scaling": (
        {"rope_scaling": {**LLAMA_3_2_1B["rope_scaling"], "beta": 1}},
        "rope_scaling: this jaxlm does not know beta",
    ),
    "an unknown scaling": (
        {"rope_scaling": {"rope_type": "llama4", "factor": 8.0}},
        "rope_type is 'llama4' .did you mean 'llama3'",
    ),
    "an unknown family": ({"model_type": "lama"}, "did you mean 'llama'"),
    "no family": ({"model_type": None}, "model_type is ''"),
    "quantized weights": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config is .* cannot compute",
    ),
    "cross-attention": ({"add_cross_attention": True}, "add_cross_attention is True"),
    "a missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "not from 1 to 4096"),
    "a size that is text": ({"hidden_size": "2048"}, "not an integer"),
    "a size that is a fraction": ({"hidden_size": 2048.5}, "not an integer"),
    "a size that is true": ({"num_attention_heads": True}, "not an integer"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "heads that do not divide": ({"num_key_value_heads": 7}, "num_kv_heads 7"),
    "an odd head": ({"head_dim": 63}, "must be even"),
    "an infinite epsilon": ({"rms_norm_eps": float("inf")}, "not finite"),
    "a negative epsilon": ({"rms_norm_eps": -1.0}, "norm_epsilon"),
    "an unknown activation": ({"hidden_act": "gelu10"}, "hidden_act is 'gelu10'"),
    "a flag that is a number": ({"tie_word_embeddings": 1}, "not true or false"),
    "a list for a size": ({"vocab_size": [1]}, "not an integer"),
    "a scaling that is text": ({"rope_scaling": "linear"}, "not a dictionary"),
    "a factor without a kind": (
        {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
        "factor is 8.0, which this jaxlm cannot",
    ),
    "a factor below 1": (
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        "factor is 0.5",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_named_in_one_line(fault):
    changes, message = WRONG[fault]
    with pytest.raises(ValueError, match=message) as raised:
        read(LLAMA_3_2_1B, **changes)
    text = str(raised.value)
    assert text.startswith("config.json") and "\n" not in text


def test_an_ignored_scaling_is_impossible():
    """Each key of a scaling changes the model or is rejected."""
    scaling = LLAMA_3_2_1B["rope_scaling"]
    whole = read(LLAMA_3_2_1B)
    for name in set(scaling) - {"rope_type"}:
        changed = {**scaling, name: scaling[name] * 2}
        assert read(LLAMA_3_2_1B, rope_scaling=changed) != whole, name
    assert read(LLAMA_3_2_1B, rope_scaling=None).rope_scaling is None


def test_only_a_table_that_is_not_the_head_takes_over_its_scale():
    tied = dataclasses.replace(preset("llama2-7b"), tied_embeddings=True)
    with pytest.raises(ValueError, match=r"llama, differs in embedding_scale: 3\.0"):
        hf_config_writing.write(dataclasses.replace(tied, embedding_scale=3.0))
    untied = dataclasses.replace(tied, tied_embeddings=False, embedding_scale=3.0)
    assert hf_config_writing.write(untied)[1] == 3.0
    # Gemma's own scale stays in the model, whether or not the table is the head.
    gemma = preset("gemma-2b")
    assert hf_config_writing.write(gemma)[1] == 1.0
    gemma = dataclasses.replace(gemma, tied_embeddings=False)
    assert hf_config_writing.write(gemma)[1] == 1.0
    half = dataclasses.replace(gemma, embedding_scale=gemma.embedding_scale / 2)
    assert hf_config_writing.write(half)[1] == 0.5


def test_a_model_of_no_family_is_refused_with_the_differences():
    config = dataclasses.replace(preset("llama2-7b"), activation="relu_squared")
    config = dataclasses.replace(config, qk_norm="head", parallel_block=True)
    with pytest.raises(ValueError, match="the nearest, qwen3, differs in parallel_bl"):
        hf_config_writing.write(config)
