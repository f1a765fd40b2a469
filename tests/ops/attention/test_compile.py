"""Kernels compile for TPUs and GPUs, with the vendors' compilers and without a device.

This shows that the compilers accept them, not that they are right or fast.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASE = Path(__file__).parent / "compile_case.py"
pytestmark = pytest.mark.aot
needs_cuda = pytest.mark.skipif(
    find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None,
    reason="the cuda13 plugin is not installed",
)


def run_case(*arguments):
    child = subprocess.run(
        [sys.executable, CASE, *arguments],
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": "",
            # Its assembler then writes what it made of each kernel.
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    # Registers that did not suffice, matrix instructions that wait for one another, and
    # a register limit that was not taken.
    text = child.stdout + child.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", text)]
    assert not any(spills), spills
    assert bool(spills) == arguments[0].startswith("h100"), "no word from ptxas"
    assert not re.search("serialized|setmaxnreg.*ignored", text)
    return json.loads(child.stdout.splitlines()[-1])


def check(found, backward=2, backward_256=2):
    """Every case compiles and has our kernels: one forward, and the backward ones."""
    assert {n: f["error"] for n, f in found.items() if "error" in f} == {}
    for name, case in found.items():
        kernels = 1 + (backward_256 if name == "256" else backward)
        assert case["kernels"] == (1 if name.startswith("decode") else kernels), name
    # The [T, S] scores of one head would take 2 GiB in bf16.
    assert found["32k"]["temporaries_mib"] < 1024


@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tpu(target):
    check(run_case(target, "pallas_tpu"))


def check_layers(sent, chips, layers=16, slack=1.05):
    """Each weight is gathered in bf16 once in each pass, and its gradient scattered."""
    # Of llama3.2-1b: q and o, k and v, and the three of the feed-forward.
    layer = 2_048 * (2 * 2_048 + 2 * 512 + 3 * 8_192)
    others = (chips - 1) / chips / 2**30
    assert sent["layer weights"] < 1.05 * 2 * 2 * layers * layer * others
    # Some scatters have no name.
    gradients = sent["gradients"] + sent["optimizer"] + sent["rest"]
    assert gradients < slack * 4 * layers * layer * others


def check_vocabulary(sent, chips):
    others = (chips - 1) / chips / 2**30
    # The tied head, 128,256 x 2,048, is gathered once, whatever the number of chunks.
    assert sent["head"] < 1.05 * (2 + 4) * 128_256 * 2_048 * others
    # Two rows of 4,096 tokens of each device: all ids go to all, perhaps in a reduction,
    # and values, 2,048 wide in bf16, there and back. The table stays where it is.
    values, ids = 2 * 2 * 2_048 * 2 * 4_096, 2 * 4 * chips * 2 * 4_096
    assert sent["embedding"] < 1.05 * (values + ids) * others


def test_a_step_on_a_torus_of_three_dimensions():
    """The compiler would gather and scatter by all-reduces, with twice the bytes."""
    found = run_case("v5p:4x4x4", "step", "pallas_tpu", "2")
    # It pads, and still reduces the smallest matrices whole.
    check_layers(found["gib_sent"], chips=64, layers=2, slack=1.35)
    check_vocabulary(found["gib_sent"], chips=64)
    assert found["gib_reduced"] < 0.05 * sum(found["gib_sent"].values())


def test_a_step_of_a_1b_model_on_256_tpus():
    found = run_case("v5e:16x16", "step", "pallas_tpu", "16")
    # One forward kernel, one more where the block is recomputed, and two backward.
    assert found["kernels"] == 4
    assert found["collectives"]["all-gather"] > 0
    check_vocabulary(found["gib_sent"], chips=256)
    # A v5e has 16 GiB.
    assert found["arguments_mib"] + found["temporaries_mib"] < 8192


@needs_cuda
@pytest.mark.parametrize("forward", ["plain", "specialized"])
def test_h100(forward):
    found = run_case("h100:1", "pallas_gpu", forward)
    assert "float32 is neither bfloat16 nor float16" in found.pop("float32")["error"]
    # Wide heads have separate kernels for dk and dv.
    check(found, backward_256=3)


@needs_cuda
def test_a_step_of_a_1b_model_on_8_gpus():
    found = run_case("h100:8", "step", "pallas_gpu", "16")
    assert found["kernels"] == 4
    assert found["collectives"]["reduce-scatter"] > 0
    check_layers(found["gib_sent"], chips=8)
    check_vocabulary(found["gib_sent"], chips=8)
    assert found["arguments_mib"] + found["temporaries_mib"] < 60_000
