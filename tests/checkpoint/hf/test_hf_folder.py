"""Hugging Face folders: reading, rejection of bad files, and round trips."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from parity_case import nested, weights
from safetensors.numpy import load_file, save_file

from jaxlm import tree
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.model.presets import preset, toy

LLAMA = toy(preset("llama3.2-1b"))


def random(config, dtype=np.float32):
    return jax.tree.map(lambda x: jnp.asarray(x.astype(dtype)), nested(weights(config)))


def make(folder, config=LLAMA, dtype=None):
    """Writes a folder with random weights, and returns the weights."""
    params = random(config)
    write_hf(folder, config, params, None, dtype)
    return params


def rewrite(folder, change):
    """Applies `change` to the dict of tensors of a folder, with the official library."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def read(folder):
    lines = []
    _, params = load(folder, report=lines.append)
    return params, lines


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_keeps_every_bit(tmp_path, dtype):
    params = random(LLAMA, dtype)
    write_hf(tmp_path / "a", LLAMA, params, None)
    config, again = load(tmp_path / "a")
    assert dataclasses.replace(config, init_std=LLAMA.init_std) == LLAMA
    for path, value in tree.flatten(params).items():
        found = tree.flatten(again)[path]
        assert found.dtype == dtype
        assert np.array_equal(np.asarray(found), np.asarray(value)), path
    write_hf(tmp_path / "b", config, again, None)
    first, second = ((tmp_path / n / "model.safetensors") for n in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_a_requested_dtype(tmp_path, stored, wanted):
    params = make(tmp_path / "m", dtype=stored)
    _, found = load(tmp_path / "m", dtype=wanted)
    for path, value in tree.flatten(params).items():
        expected = np.asarray(value).astype(stored).astype(wanted)
        x = tree.flatten(found)[path]
        assert x.dtype == wanted and np.array_equal(np.asarray(x), expected), path


def test_float64_is_read_as_float32_and_reported(tmp_path):
    params = make(tmp_path / "m")

    def widen(tensors):
        tensors |= {name: x.astype(np.float64) for name, x in tensors.items()}

    rewrite(tmp_path / "m", widen)
    found, lines = read(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    assert lines == ["float64 weights are read as float32"]


def test_layers_in_several_dtypes_lose_nothing(tmp_path):
    """The first in bfloat16, the second in float16: float32 holds both."""
    config = toy(preset("phi3-mini-4k"))  # q, k and v in one tensor
    params = make(tmp_path / "m", config)
    name = "model.layers.{}.mlp.down_proj.weight"

    def narrow(tensors):
        for i, dtype in enumerate((ml_dtypes.bfloat16, np.float16)):
            tensors[name.format(i)] = tensors[name.format(i)].astype(dtype)

    rewrite(tmp_path / "m", narrow)
    found, _ = read(tmp_path / "m")
    down = found["layers"]["mlp"]["down"]
    assert down.dtype == jnp.float32
    for i, dtype in enumerate((ml_dtypes.bfloat16, np.float16)):
        stored = np.asarray(params["layers"]["mlp"]["down"][i]).astype(dtype)
        np.testing.assert_array_equal(down[i], stored.astype(np.float32))
    # Written again with another dtype for queries than for keys and values.
    attn = found["layers"]["attn"]
    attn["q"] = attn["q"].astype(jnp.bfloat16)
    write_hf(tmp_path / "out", config, found, None)
    again, _ = read(tmp_path / "out")
    np.testing.assert_array_equal(
        again["layers"]["attn"]["q"], attn["q"].astype(jnp.float32)
    )
    np.testing.assert_array_equal(again["layers"]["attn"]["k"], attn["k"])


def test_shards_are_read_as_one_file_is(tmp_path):
    params = make(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    names, folder = sorted(tensors), tmp_path / "m"
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    found, _ = read(folder)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


K = "model.layers.1.self_attn.k_proj.weight"
FAULTS = {
    "missing": (drop(K), rf"lacks {re.escape(K)}"),
    "misspelled": (
        lambda t: t.__setitem__(K.replace("k_proj", "k_prox"), t.pop(K)),
        rf"lacks {re.escape(K)}.*did you mean",
    ),
    "extra": (
        put("model.layers.2.self_attn.k_proj.weight", np.zeros(3, np.float32)),
        r"has model\.layers\.2\.self_attn\.k_proj\.weight, which",
    ),
    "bias": (
        put("model.layers.0.self_attn.k_proj.bias", np.zeros(48, np.float32)),
        r"has model\.layers\.0\.self_attn\.k_proj\.bias",
    ),
    "shape": (
        put(K, np.zeros((48, 47), np.float32)),
        r"k_proj\.weight has shape \[48, 47\], but the config requires \[48, 48\]",
    ),
    "integers": (put(K, np.zeros((48, 48), np.int8)), "is stored as I8"),
    "another head": (
        put("lm_head.weight", np.zeros((64, 48), np.float32)),
        r"lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_named(tmp_path, fault):
    change, message = FAULTS[fault]
    make(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path / "m")
    assert "\n" not in str(raised.value)


def test_unused_tensors_may_be_present(tmp_path):
    params = make(tmp_path / "m")

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[buffer] = np.ones(8, np.float32)

    rewrite(tmp_path / "m", change)
    found, lines = read(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert not lines


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_reported(tmp_path, value, dtype):
    make(tmp_path / "m", dtype=dtype)
    rewrite(tmp_path / "m", lambda t: t[K].__setitem__((3, 4), value))
    _, lines = read(tmp_path / "m")
    assert lines == [f"values that are not finite in {K}"]


def test_a_value_too_large_for_a_dtype_is_an_error(tmp_path):
    params = jax.tree.map(lambda x: x + 1e5, random(LLAMA))
    with pytest.raises(ValueError, match="float16 cannot hold"):
        write_hf(tmp_path / "m", LLAMA, params, None, np.float16)


def test_gpt2_as_it_was_first_published(tmp_path):
    config = toy(preset("gpt2-124m"))
    params = make(tmp_path / "m", config)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)

    rewrite(tmp_path / "m", change)
    found, _ = read(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_in_a_multimodal_gemma3(tmp_path, prefix):
    params = make(tmp_path / "m", toy(preset("gemma3-4b")))
    path = tmp_path / "m" / "config.json"
    text = json.loads(path.read_text())
    outer = {"model_type": "gemma3", "text_config": text, "mm_tokens_per_image": 256}
    path.write_text(json.dumps(outer))

    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.x.weight"] = np.ones(3, np.float32)
        tensors["multi_modal_projector.y"] = np.ones(3, np.float32)

    rewrite(tmp_path / "m", change)
    found, _ = read(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_gpt_oss_in_mxfp4(tmp_path):
    """Blocks of 4-bit values along the input axis, decoded exactly."""
    config = dataclasses.replace(toy(preset("gpt-oss-20b")), model_dim=64)
    config = dataclasses.replace(config, hidden_dim=96)
    make(tmp_path / "m", config)
    rng = np.random.default_rng(0)
    E, D, F = config.num_experts, 64, 96
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = np.concatenate([table, -table])
    expected = {}

    def pack(rows, inputs):
        codes = rng.integers(0, 16, (E, rows, inputs))
        scales = rng.integers(120, 134, (E, rows, inputs // 32))
        values = table[codes].reshape(E, rows, -1, 32) * 2.0 ** (
            scales[..., None] - 127
        )
        pairs = codes.reshape(E, rows, inputs // 32, 16, 2)
        blocks = (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8)
        return blocks, scales.astype(np.uint8), values.reshape(E, rows, inputs)

    def change(tensors):
        for layer in range(config.num_layers):
            at = f"model.layers.{layer}.mlp.experts."
            for name, rows, inputs in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
                del tensors[at + name]
                blocks, scales, values = pack(rows, inputs)
                tensors[f"{at}{name}_blocks"] = blocks
                tensors[f"{at}{name}_scales"] = scales
                expected[name, layer] = values

    rewrite(tmp_path / "m", change)
    found, _ = read(tmp_path / "m")
    moe = found["layers"]["moe"]
    assert moe["gate"].dtype == jnp.bfloat16
    for layer in range(config.num_layers):
        both = expected["gate_up_proj", layer]  # [E, 2F, D], gate and up in turn
        for name, first in (("gate", 0), ("up", 1)):
            ours = np.asarray(moe[name][layer], np.float32)
            np.testing.assert_array_equal(ours, both[:, first::2].swapaxes(1, 2))
        ours = np.asarray(moe["down"][layer], np.float32)
        expected_down = expected["down_proj", layer].swapaxes(1, 2)
        np.testing.assert_array_equal(ours, expected_down)


def test_paths_that_are_not_models(tmp_path):
    make(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match=r"is pickled.*save_pretrained"):
        load(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="give its folder"):
        load(tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load(tmp_path)
    (tmp_path / "m" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is nested too deeply"):
        load(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ValueError, match="not a checkpoint"):
        load(tmp_path / "m")


def test_the_hub_without_its_package_and_without_a_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[hub\]'"):
        load("hf:owner/name")


def test_only_pickles_in_a_folder_are_refused(tmp_path):
    make(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="save_pretrained"):
        load(tmp_path / "m")


def test_an_adapter_beside_the_weights_is_not_ignored(tmp_path):
    make(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json: jaxlm does not read"):
        load(tmp_path / "m")


SHARDED = """
import sys
import jax, numpy as np
from jaxlm import tree
from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.config import MeshConfig
from jaxlm.model.params import parameter_shardings
from jaxlm.sharding.mesh import make_mesh

config, whole = load(sys.argv[1])
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
with jax.set_mesh(mesh):
    shardings = parameter_shardings(jax.eval_shape(lambda: whole), mesh)
    _, cut = load(sys.argv[1], shardings=shardings)
for path, x in tree.flatten(cut).items():
    assert x.sharding == tree.flatten(shardings)[path], path
    assert np.array_equal(np.asarray(x), np.asarray(tree.flatten(whole)[path])), path
parts = {x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(cut)}
assert True in parts
"""


def test_each_device_gets_its_part(tmp_path):
    config = dataclasses.replace(LLAMA, num_heads=8, num_kv_heads=4)
    make(tmp_path / "m", config)
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "m")],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags},
        timeout=1200,
    )


def test_an_opened_folder_reads_no_weights(tmp_path):
    make(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert open_checkpoint(tmp_path / "m").config.num_layers == LLAMA.num_layers
