"""Damaged and hostile configs: each is read, or raises one clear ValueError."""

import pytest

from jaxlm.checkpoint.gguf import gguf_config
from jaxlm.checkpoint.hf import hf_config, hf_config_writing
from jaxlm.checkpoint.hf.hf_folder import read_config
from jaxlm.checkpoint.keys import Keys
from jaxlm.model.presets import PRESETS, preset

HUGE = 10**400
"""An integer that no float can hold."""
GEMMA2, _ = hf_config_writing.write(preset("gemma2-2b"))
LLAMA, _ = hf_config_writing.write(preset("llama3.2-1b"))
DEEP: dict = {"model_type": "gemma3"}
for _ in range(900):
    DEEP = {"model_type": "gemma3", "text_config": DEEP}


def scaling(kind, **values):
    return {**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 4.0, **values}}


LONGROPE = {"short_factor": [1.0] * 32, "long_factor": [1.0] * 32, "factor": None}

HOSTILE = {
    "a scale of 0": ({**GEMMA2, "query_pre_attn_scalar": 0}, "not above 0"),
    "a scale below 0": ({**GEMMA2, "query_pre_attn_scalar": -4}, "not above 0"),
    "a number of 400 digits": ({**LLAMA, "rms_norm_eps": HUGE}, "not finite in float"),
    "a size of 400 digits": ({**LLAMA, "hidden_size": HUGE}, "not from 1 to"),
    "a list of such numbers": (
        scaling("longrope", **LONGROPE, original_max_position_embeddings=HUGE),
        "not from 1 to",
    ),
    "factors of 400 digits": (
        scaling("longrope", **{**LONGROPE, "long_factor": [HUGE] * 32}),
        "long_factor is not a list",
    ),
    "900 levels": (DEEP, "text_config: model_type is 'gemma3', not 'gemma3_text'"),
    "a factor of 1e308": (scaling("linear", factor=1e308), "not finite in float32"),
    "a factor of 1e9": (
        scaling("yarn", factor=1e9),
        "must be at least 1, at most a million",
    ),
    "a context of 1e11": (scaling("dynamic", factor=1e6), "131072000000 tokens"),
    "beta 0": (scaling("yarn", beta_slow=0), "beta_slow is 0.0: it must be > 0"),
    "theta 0": ({**LLAMA, "rope_theta": 0}, "rope_theta is 0.0: it must be at least 1"),
    "theta 1": ({**scaling("yarn"), "rope_theta": 1}, "it must be > 1"),
    "a context of 1": (
        scaling("longrope", **LONGROPE, original_max_position_embeddings=1),
        "must be at least 2",
    ),
    "a long value": ({**LLAMA, "quantization_config": "x" * 100_000}, "'xxx"),
    "a long word": ({**LLAMA, "hidden_act": "x" * 100_000}, "hidden_act is 'xxx"),
    "an escape sign": ({**LLAMA, "\x1b[31m\n": 1}, r"'\x1b[31m\n'"),
    "10,000 keys": ({**LLAMA, **{f"k{i}": 1 for i in range(10_000)}}, "know k0, k1, "),
}


def one_line(error, where):
    message = str(error)
    assert type(error) is ValueError and message.startswith(where)
    assert message.isprintable() and len(message) < 600, message
    return message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_refused_in_one_line(name):
    values, reason = HOSTILE[name]
    with pytest.raises(ValueError) as error:
        hf_config.read(Keys(values, "config.json"))
    assert reason in one_line(error.value, "config.json")


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"vocab_size": 1, "vocab_size": 2}', "the name vocab_size appears twice"),
        ('{"a": {"b": 1, "b": 1}}', "the name b appears twice"),
        (f'{{"a": {"1" * 5000}}}', "Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not a JSON object"),
        ("\ud800", "can't decode"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path, text, reason):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    assert reason in one_line(error.value, str(path))


def gguf(preset_name, **changes):
    arch, metadata, _ = gguf_config.write_config(preset(preset_name))
    return metadata | {f"{arch}.{k.replace('__', '.')}": v for k, v in changes.items()}


def read_gguf_config(name, metadata):
    config = preset(name)
    tied, divisors = config.tied_embeddings, gguf_config.rope_tensors(config)
    return gguf_config.read_config(
        metadata, config.vocab_size, tied, divisors, "a.gguf"
    )


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rope__freq_base": 1.0, "rope__scaling__type": "yarn"}, "it must be > 1"),
        ({"rope__freq_base": 0.0}, "rope.freq_base is 0.0, not above 0"),
        ({"rope__freq_base": 1e308}, "not finite"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__yarn_beta_slow": 0.0},
            "beta_slow is 0.0",
        ),
    ],
)
def test_a_hostile_gguf_config_is_refused_in_one_line(changes, reason):
    with pytest.raises(ValueError) as error:
        read_gguf_config("qwen2.5-0.5b", gguf("qwen2.5-0.5b", **changes))
    assert reason in one_line(error.value, "a.gguf")


def test_longrope_over_one_token_is_refused():
    name = next(n for n, c in PRESETS.items() if gguf_config.ROPE_LONG in
                gguf_config.rope_tensors(c))  # fmt: skip
    changes = {"rope__scaling__original_context_length": 1}
    with pytest.raises(ValueError) as error:
        read_gguf_config(name, gguf(name, **changes))
    assert "must be at least 2" in one_line(error.value, "a.gguf")
