"""The configs for pods compile for their chips, fit, and send no more than they must."""

import json
import math
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launch_case import REPOSITORY

from jaxlm.model.params import weights

CASE = Path(__file__).parent / "launch_case.py"
GIB = 2**30
# Config, target, attention, GiB of a chip.
RUNS = [
    ("llama_1b_v5e_16", "v5e:4x4", "splash", 15.75),
    ("llama_8b_v5p_64", "v5p:4x4x4", "splash", 95),
    ("llama_8b_h100_8", "h100:8", "pallas_gpu", 79),
]
needs_cuda = pytest.mark.skipif(
    find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None,
    reason="the cuda13 plugin is not installed",
)


def compiled(name, target, attention, layers, *changes):
    """Returns the figures of each change."""
    child = subprocess.run(
        [sys.executable, CASE, name, target, attention, str(layers), *changes],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line[:1] == "{"]


def check_memory(found, gib):
    used = (found["arguments_mib"] + found["temporaries_mib"]) / 1024
    assert 0 < used < gib, found


def config_of(name):
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]()


def layer_gib(model, layers=2):
    """GiB of the matrices of the layers, at one byte a parameter."""
    matrices = [
        weight.shape(model)[1:]
        for weight in weights(model).values()
        if "L" in weight.stacked and weight.role.multiplies
    ]
    size = sum(map(math.prod, matrices))
    return layers * size / GIB


def check_dtypes(found):
    """No weight travels in f32, though it is kept so; rings gather by permutes."""
    table = [row for row in found["table"] if row["dtype"] == "f32"]
    gathered = [
        row
        for row in table
        if row["part"] == "layer weights" or row["kind"] == "all-gather"
    ]
    assert sum(row["gib"] for row in gathered) < 1e-3, gathered
    # Gradients do.
    assert table


def check_traffic(found, config, chips, slack=1.05, num_layers=2, tensor=1):
    """Weights are gathered in bf16 once in each pass, gradients scattered once in f32.

    The head likewise, whatever the number of chunks. Of the embedding only rows move:
    the ids of all devices to all, and the values there and back. Beside `tensor` each
    of the `chips` has its part of a weight, and both add one array of activations up.
    """
    check_dtypes(found)
    model, rows = config.model, config.train.batch_size // config.mesh.fsdp
    sent, others = found["gib_sent"], (chips - 1) / chips
    layers = layer_gib(model, num_layers) / tensor * others
    assert sent["layer weights"] < slack * 2 * 2 * layers
    # Some scatters have no name.
    gradients = sent["gradients"] + sent["optimizer"] + sent["rest"]
    assert gradients < slack * 4 * layers
    head = model.vocab_size * model.model_dim / GIB / tensor * others
    tokens = rows * config.data.sequence_length / GIB
    added_up = 2 * 2 * model.model_dim * tokens * (tensor - 1) / tensor
    assert sent["head"] < 1.05 * ((2 + 4) * head + added_up)
    values, ids = 2 * 2 * model.model_dim * tokens, 2 * 4 * chips * tokens
    rows_moved = (values + ids) * others
    assert sent["embedding"] < 1.05 * (rows_moved + added_up)
    of_tensor = sent["tensor parallelism"]
    assert of_tensor <= 1.02 * 5 * num_layers * added_up
    needed = (2 * 2 + 4) * layers + (2 + 4) * head + rows_moved
    assert sum(sent.values()) - of_tensor < 1.15 * needed


@pytest.mark.aot
def test_two_layers_on_a_torus_of_three_dimensions():
    """The compiler would gather and scatter by all-reduces, with twice the bytes, and
    wait for them."""
    (found,) = compiled("llama_8b_v5p_64", "v5p:4x4x4", "pallas_tpu", 2)
    check_memory(found, gib=95)
    # One forward kernel, one more where the block is recomputed, and two backward.
    assert found["kernels"] == 4
    check_traffic(found, config_of("llama_8b_v5p_64"), chips=64)
    sent, waited_for = found["gib_sent"], found["gib_waited_for"]
    assert found["gib_reduced"] < 0.05 * sum(sent.values())
    for part in ("layer weights", "gradients"):
        assert waited_for[part] < 0.2 * sent[part]


@pytest.mark.aot
@pytest.mark.nightly
def test_two_layers_on_a_torus_beside_tensor_parallelism():
    """Recorded in benchmarks/results/step_traffic.json."""
    mesh = json.dumps({"mesh.fsdp": 64, "mesh.tensor": 2, "train.batch_size": 64})
    (found,) = compiled("llama_8b_v5p_64", "v5p:4x4x8", "pallas_tpu", 2, mesh)
    check_memory(found, gib=95)
    assert found["kernels"] == 4
    check_traffic(found, config_of("llama_8b_v5p_64"), chips=64, tensor=2)
    sent, waited_for = found["gib_sent"], found["gib_waited_for"]
    for part in ("layer weights", "gradients"):
        assert waited_for[part] < 0.2 * sent[part]


@pytest.mark.aot
@pytest.mark.nightly
def test_two_layers_with_more_tensor_parts_than_key_heads():
    """16 for 8, with five reductions a layer as ever."""
    mesh = json.dumps({"mesh.fsdp": 2, "mesh.tensor": 16, "train.batch_size": 2})
    (found,) = compiled("llama_8b_v5p_64", "v5p:2x4x4", "pallas_tpu", 2, mesh)
    check_memory(found, gib=95)
    assert found["kernels"] == 4
    check_dtypes(found)
    model, sent = config_of("llama_8b_v5p_64").model, found["gib_sent"]
    added_up = 2 * 2 * model.model_dim * 8192 / GIB * 15 / 16
    assert 0 < sent["tensor parallelism"] < 1.02 * 5 * 2 * added_up
    layers = layer_gib(model) / 16 / 2
    assert 0 < sent["layer weights"] < 1.05 * 2 * 2 * layers
    # Key heads are repeated by an exchange along `tensor`.
    assert 0 < sent["gradients"] + sent["rest"] < 1.2 * 4 * layers


@pytest.mark.aot
def test_two_layers_on_sixteen_chips():
    (found,) = compiled("llama_1b_v5e_16", "v5e:4x4", "splash", 2)
    check_memory(found, gib=15.75)
    assert found["kernels"]
    # Some scatters of v5e are permutes of tiles.
    check_traffic(found, config_of("llama_1b_v5e_16"), chips=16, slack=1.15)


@pytest.mark.aot
@pytest.mark.nightly
def test_two_layers_on_a_torus_of_two_dimensions_that_waits_for_gathers():
    """Of v6e. Recorded in benchmarks/results/step_traffic.json."""
    changes = {"data.sequence_length": 4096, "model.context_length": 4096}
    changes |= {"mesh.fsdp": 16, "train.batch_size": 32}
    (found,) = compiled(
        *("llama_8b_v5p_64", "v6e:4x4", "pallas_tpu", 2, json.dumps(changes))
    )
    check_memory(found, gib=31.25)
    sent, waited_for = found["gib_sent"], found["gib_waited_for"]
    for part in ("layer weights", "gradients"):
        assert waited_for[part] < 0.05 * sent[part]


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize(
    "target, gib, slack",
    # On v5e rows of 8 among 256 are padded to tiles, and the smallest are reduced whole.
    [("v5e:16x16", 15.75, 1.3), ("v6e:16x16", 31.25, 1.05), ("v5p:4x8x8", 95, 1.05)],
)
def test_two_layers_on_sixteen_times_as_many_chips(target, gib, slack):
    """A chip sends what it sends among 16. In benchmarks/results/step_traffic.json."""
    (found,) = compiled("llama_1b_v5e_16", target, "pallas_tpu", 2)
    check_memory(found, gib)
    assert found["kernels"] == 4
    check_traffic(found, config_of("llama_1b_v5e_16"), chips=256, slack=slack)
    sent, waited_for = found["gib_sent"], found["gib_waited_for"]
    for part in ("layer weights", "gradients"):
        assert "v5e" in target or waited_for[part] < 0.05 * sent[part]


@pytest.mark.aot
@needs_cuda
def test_two_layers_on_gpus():
    found, whole = compiled(
        *("llama_8b_h100_8", "h100:8", "pallas_gpu", 2, "{}"),
        '{"train.batch_size": 16, "train.accumulation_steps": 2,'
        ' "train.accumulate_whole": true, "optimizer.name": "muon"}',
    )
    check_memory(found, gib=79)
    assert found["kernels"] == 4
    assert found["collectives"]["reduce-scatter"] > 0
    config = config_of("llama_8b_h100_8")
    check_traffic(found, config, chips=8)
    check_dtypes(whole)
    sent, layers = whole["gib_sent"], layer_gib(config.model) * 7 / 8
    # Twice the weights in bf16, though most devices have no layer to orthogonalize.
    assert 0 < sent["optimizer"] < 2 * 2 * layer_gib(config.model)
    # Gathered once and added up once, in two microbatches.
    assert 0 < sent["layer weights"] < 1.05 * 2 * layers
    assert 0 < sent["gradients"] < 1.05 * 4 * layers


@pytest.mark.aot
@pytest.mark.nightly
@needs_cuda
def test_tensor_parallelism_of_two_layers():
    """Recorded, with more layers, in benchmarks/results/step_traffic.json."""
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 4, "model.remat": "full"}
    experts = {"model.num_experts": 4, "model.experts_per_token": 2}
    accumulated = {"train.accumulation_steps": 2, "train.accumulate_whole": True}
    accumulated |= {"optimizer.name": "muon"}
    whole, cut, experts, accumulated = compiled(
        *("llama_8b_h100_8", "h100:8", "pallas_gpu", 2, json.dumps(mesh)),
        json.dumps(mesh | {"model.sequence_parallel": True}),
        json.dumps(mesh | experts | {"model.hidden_dim": 4096}),
        json.dumps(mesh | accumulated),
    )
    config = config_of("llama_8b_h100_8")
    rows, length = config.train.batch_size // 2, config.data.sequence_length
    part = 2 * rows * length * config.model.model_dim / 4 / GIB
    # Five reductions a layer, each two exchanges of the other three parts.
    reduced = 2 * 5 * 2 * 3 * part
    for found in (whole, experts, accumulated):
        check_dtypes(found)
        assert 0 < found["gib_sent"]["tensor parallelism"] < 1.02 * reduced
    # Twice the weights in bf16, though most devices have no layer to orthogonalize.
    assert 0 < accumulated["gib_sent"]["optimizer"] < 2 * 2 * layer_gib(config.model)
    # As many scatters, and a gather more, of what the backward pass has not saved.
    exchanged = 2 * (5 + 6) * 3 * part
    assert 0 < cut["gib_sent"]["tensor parallelism"] < 1.02 * exchanged
    # Of each layer's input it saves a quarter.
    saved = (whole["temporaries_mib"] - cut["temporaries_mib"]) / 1024
    assert saved > 2 * 3 * part


@pytest.mark.aot
@pytest.mark.nightly
@needs_cuda
def test_experts_of_two_layers_and_two_microbatches():
    """Gradients are added up once; those of experts along `data` alone."""
    changes = {"mesh.data": 2, "mesh.fsdp": 1, "mesh.expert": 4, "train.batch_size": 16}
    changes |= {"model.num_experts": 4, "model.experts_per_token": 2}
    changes |= {"model.hidden_dim": 4096, "train.accumulation_steps": 2}
    (found,) = compiled(
        *("llama_8b_h100_8", "h100:8", "pallas_gpu", 2, json.dumps(changes))
    )
    model = config_of("llama_8b_h100_8").model
    experts = 2 * 4 * 3 * model.model_dim * 4096 / GIB
    others = layer_gib(model) - 2 * 3 * model.model_dim * model.hidden_dim / GIB
    table = model.vocab_size * model.model_dim / GIB
    sent, twice = found["gib_sent"], 2 * 4 * 7 / 8
    once = twice * others + 2 * 4 / 2 * experts / 4
    assert 0 < sent["gradients"] < 1.02 * once
    assert 0 < sent["head"] + sent["embedding"] < 1.02 * 2 * twice * table


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("name, target, attention, gib", RUNS)
def test_the_whole_model(name, target, attention, gib):
    """Recorded in benchmarks/results/step_traffic.json."""
    (found,) = compiled(name, target, attention, 0)
    check_memory(found, gib)
    assert found["kernels"]
    config = config_of(name)
    # Some scatters of v5e are permutes of tiles.
    layers = config.model.num_layers
    check_traffic(found, config, config.mesh.fsdp, slack=1.15, num_layers=layers)
