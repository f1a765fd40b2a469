"""Kernels compile for TPUs and GPUs, with the vendors' compilers and without a device.

This shows that the compilers accept them, not that they are right or fast.
"""

import json
import os
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
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-3000:]
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


def test_a_step_of_a_1b_model_on_256_tpus():
    found = run_case("v5e:16x16", "step", "pallas_tpu")
    # One forward kernel, one more where the block is recomputed, and two backward.
    assert found["kernels"] == 4
    assert found["collectives"]["all-gather"] > 0
    # Two rows of 4,096 tokens, 2,048 wide in bf16, are exchanged there and back; the
    # embedding is neither gathered nor reduced.
    assert found["gib_sent"]["embedding"] < 1.05 * (2 * 2 * 4096 * 2048 * 2) / 2**30
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
    found = run_case("h100:8", "step", "pallas_gpu")
    assert found["kernels"] == 4
    assert found["collectives"]["reduce-scatter"] > 0
    # The tied head of 128,256 x 2,048 is gathered once in bf16, and its gradient is
    # reduced once in f32, whatever the number of chunks.
    once = 128_256 * 2_048 * 7 / 8 / 2**30
    assert found["gib_sent"]["head"] < 1.05 * (2 + 4) * once
    assert found["gib_sent"]["embedding"] < 1.05 * (2 * 2 * 4096 * 2048 * 2) / 2**30
    assert found["arguments_mib"] + found["temporaries_mib"] < 60_000
