"""Models in GGUF files: keys, names, the order of rows, and rejection of bad files."""

import dataclasses
import re

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_case import NAMES, small
from parity_case import nested, weights

from jaxlm import tree
from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.gguf.gguf_config import (
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    read_config,
    rope_tensors,
    write_config,
)
from jaxlm.checkpoint.gguf.gguf_file import read_gguf
from jaxlm.checkpoint.gguf.gguf_model import write_model
from jaxlm.checkpoint.gguf.gguf_writing import write_gguf
from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.fields import diff
from jaxlm.model.presets import PRESETS, preset, toy

LLAMA = toy(preset("smollm2-135m"))
# Quantized types require rows of a multiple of 32 values.
WIDE = dataclasses.replace(
    LLAMA, model_dim=64, hidden_dim=96, num_heads=4, num_kv_heads=2
)


def random(config):
    return jax.tree.map(jnp.asarray, nested(weights(config)))


def read(path):
    lines = []
    config, params = load(path, report=lines.append)
    assert not lines
    return config, tree.flatten(params)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, name):
    config = small(name)
    params = tree.flatten(random(config))
    write_model(tmp_path / "m.gguf", config, random(config), None, "f32")
    found_config, found = read(tmp_path / "m.gguf")
    ignored = (*NOT_KEPT, "rope_scaling", "attention_scale")
    assert not diff(config, found_config, ignore=ignored)
    assert (config.rope_scaling is None) == (found_config.rope_scaling is None)
    assert set(found) == set(params)
    # The file has 1 added to Gemma's scales, so small scales lose their last bits.
    exact = config.norm != "rms_unit_offset"
    for path, value in params.items():
        difference = np.abs(np.asarray(found[path]) - np.asarray(value)).max()
        assert difference <= (0 if exact else 6e-8), path


def test_each_llama_of_the_presets_is_an_architecture():
    """At full size, where the parameters of Llama 3's scaling are recognized."""
    for name in ("llama3.1-8b", "llama3.2-3b", "gemma3-27b", "gemma2-27b", "qwen3-8b"):
        config = PRESETS[name]
        _, metadata, _ = write_config(config)
        # In f32, as in a file.
        rope = {n: x.astype(np.float32) for n, x in rope_tensors(config).items()}
        back = read_config(
            metadata, config.vocab_size, config.tied_embeddings, rope, name
        )
        lines = diff(config, back, ignore=(*NOT_KEPT, "attention_scale"))
        assert lines in ([], ["rope_scaling.original_context_length: 8192 -> 0"]), name


def llama_cpp_rows(w, heads):
    """Reorders the rows of q or k as llama.cpp's converter does.

    From its documentation: the rows of a head go from (first half, second half) to
    pairs. `w` is (out, in).
    """
    out = np.empty_like(w)
    head = w.shape[0] // heads
    for n in range(heads):
        for i in range(head // 2):
            out[n * head + 2 * i] = w[n * head + i]
            out[n * head + 2 * i + 1] = w[n * head + head // 2 + i]
    return out


def write_by_the_library(path, config, flat, *, quantize=None, permute=True):
    """Writes a llama file from our weights with the `gguf` package, independently."""
    c = config
    writer = library.GGUFWriter(path, "llama")
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.model_dim)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_vocab_size(c.vocab_size)
    writer.add_name("toy")
    tensors = {
        "token_embd.weight": flat["embed/table"],
        "output_norm.weight": flat["final_norm/scale"],
    }
    D = c.model_dim
    for i in range(c.num_layers):
        layer = {n[7:]: x[i] for n, x in flat.items() if n.startswith("layers/")}
        b = f"blk.{i}."
        q, k, v = (layer[f"attn/{n}"].reshape(D, -1).T for n in "qkv")
        if permute:
            q, k = llama_cpp_rows(q, c.num_heads), llama_cpp_rows(k, c.num_kv_heads)
        tensors |= {
            f"{b}attn_q.weight": q,
            f"{b}attn_k.weight": k,
            f"{b}attn_v.weight": v,
            f"{b}attn_output.weight": layer["attn/o"].reshape(-1, D).T,
            f"{b}ffn_gate.weight": layer["mlp/gate"].T,
            f"{b}ffn_up.weight": layer["mlp/up"].T,
            f"{b}ffn_down.weight": layer["mlp/down"].T,
            f"{b}attn_norm.weight": layer["attn_norm/scale"],
            f"{b}ffn_norm.weight": layer["mlp_norm/scale"],
        }
    for name, x in tensors.items():
        x = np.ascontiguousarray(x)
        if quantize is not None and x.ndim == 2:
            packed = library.quants.quantize(x, quantize)
            writer.add_tensor(name, packed, raw_dtype=quantize)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_another_writer(tmp_path):
    flat = weights(LLAMA)
    write_by_the_library(tmp_path / "m.gguf", LLAMA, flat)
    config, found = read(tmp_path / "m.gguf")
    assert not diff(LLAMA, config, ignore=NOT_KEPT)
    for path, value in flat.items():
        assert np.array_equal(np.asarray(found[path]), value), path


def test_rows_in_the_wrong_order_would_show(tmp_path):
    flat = weights(LLAMA)
    write_by_the_library(tmp_path / "m.gguf", LLAMA, flat, permute=False)
    _, found = read(tmp_path / "m.gguf")
    differ = {p for p, x in flat.items() if not np.array_equal(found[p], x)}
    assert differ == {"layers/attn/q", "layers/attn/k"}


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_quantized_weights(tmp_path, kind):
    config = WIDE
    flat = weights(config)
    number = library.GGMLQuantizationType[kind]
    write_by_the_library(tmp_path / "m.gguf", config, flat, quantize=number)
    _, found = read(tmp_path / "m.gguf")
    table = library.quants.quantize(flat["embed/table"], number)
    expected = library.quants.dequantize(table, number)
    assert np.array_equal(np.asarray(found["embed/table"]), expected)
    worst = max(np.abs(np.asarray(found[p]) - x).max() for p, x in flat.items())
    assert 0 < worst < 0.2


def test_vectors_are_f32_and_matrices_as_requested(tmp_path):
    config = WIDE
    for dtype in ("f16", "bf16", "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        write_model(path, config, random(config), None, dtype)
        for name, tensor in read_gguf(path).tensors.items():
            kind = "F32" if len(tensor.shape) == 1 else dtype.upper()
            assert tensor.stored_as == kind, name


def test_rows_that_q8_0_cannot_split_are_f16(tmp_path):
    config = dataclasses.replace(WIDE, hidden_dim=40)
    write_model(tmp_path / "m.gguf", config, random(config), None, "q8_0")
    for name, tensor in read_gguf(tmp_path / "m.gguf").tensors.items():
        if len(tensor.shape) > 1:
            whole = tensor.shape[-1] % 32 == 0
            assert tensor.stored_as == ("Q8_0" if whole else "F16"), name


@pytest.mark.parametrize("name", ["olmo2-1b", "gpt2-124m", "mistral-7b-v0.1"])
def test_models_that_llama_cpp_would_compute_otherwise(tmp_path, name):
    config = toy(preset(name))
    with pytest.raises(ValueError, match=r"no architecture of llama\.cpp comp"):
        write_model(tmp_path / "m.gguf", config, random(config), None)


def changed(tmp_path, change):
    """Writes a good file after `change` has altered its metadata and tensors."""
    write_model(tmp_path / "good.gguf", LLAMA, random(LLAMA), None, "f32")
    file = read_gguf(tmp_path / "good.gguf")
    metadata = dict(file.metadata)
    tensors = {name: np.array(t.read()) for name, t in file.tensors.items()}
    change(metadata, tensors)
    layout = {name: (x.shape, "F32") for name, x in tensors.items()}
    write_gguf(tmp_path / "bad.gguf", metadata, layout, tensors.__getitem__)
    return tmp_path / "bad.gguf"


def key(name, value):
    def change(metadata, _):
        metadata[name] = value
        if value is None:
            del metadata[name]

    return change


def no_tensor(name):
    return lambda _, tensors: tensors.pop(name)


FAULTS = {
    "architecture": (
        key("general.architecture", "lama"),
        "'lama' .did you mean 'llama'.*known are",
    ),
    "unknown key": (key("llama.attention.causal", False), "know attention.causal"),
    "unknown section": (key("adapter.type", "lora"), "the key adapter.type"),
    "one part of several": (key("split.count", 3), "split.count is 3"),
    "no size": (key("llama.embedding_length", None), "embedding_length is missing"),
    "no layers": (key("llama.block_count", 0), "block_count is 0"),
    "many layers": (key("llama.block_count", 1 << 30), "block_count is 1073741824"),
    "fewer layers": (key("llama.block_count", 1), r"has blk\.1\."),
    "more layers": (key("llama.block_count", 3), r"lacks blk\.2\."),
    "size": (key("llama.feed_forward_length", 81), "has shape .* config requires"),
    "partial rotation": (key("llama.rope.dimension_count", 8), "not the whole head"),
    "scaling": (key("llama.rope.scaling.type", "ntk"), "known are none, linear"),
    "epsilon": (
        key("llama.attention.layer_norm_rms_epsilon", float("nan")),
        "not finite",
    ),
    "table": (no_tensor("token_embd.weight"), "no matrix token_embd.weight"),
    "norm": (no_tensor("blk.0.ffn_norm.weight"), r"lacks blk\.0\.ffn_norm\.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_in_one_line(tmp_path, fault):
    change, message = FAULTS[fault]
    path = changed(tmp_path, change)
    with pytest.raises(ValueError, match=message) as raised:
        load(path)
    text = str(raised.value)
    assert text.startswith(str(path)) and "\n" not in text


@pytest.mark.parametrize(
    "values, kind",
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, "linear"),
        # As llama.cpp reads files without a type.
        ({"scaling.factor": 4.0}, "linear"),
        ({"scale_linear": 4.0}, "linear"),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, "yarn"),
    ],
)
def test_linear_and_yarn_scaling(tmp_path, values, kind):
    names = {f"llama.rope.{k}": v for k, v in values.items()}
    path = changed(tmp_path, lambda metadata, _: metadata.update(names))
    scaling = open_checkpoint(path).config.rope_scaling
    assert (scaling and (scaling.kind, scaling.factor)) == (kind and (kind, 4.0))


def with_divisors(*names, **values):
    def change(metadata, tensors):
        metadata |= {f"llama.rope.{k}": v for k, v in values.items()}
        tensors |= {name: np.ones(8, np.float32) for name in names}

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            with_divisors(ROPE_FREQS, scale_linear=2.0),
            "beside rope.scaling.type linear",
        ),
        (with_divisors(ROPE_FREQS, ROPE_LONG), f"{ROPE_FREQS} beside {ROPE_LONG}"),
        (with_divisors(ROPE_LONG), "is missing"),
        (with_divisors(ROPE_LONG, ROPE_SHORT), f"does not know llama with {ROPE_LONG}"),
    ],
)
def test_no_scaling_is_dropped(tmp_path, change, message):
    path = changed(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(path)
