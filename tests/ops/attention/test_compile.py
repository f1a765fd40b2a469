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


@needs_cuda
@pytest.mark.parametrize("forward", ["plain", "specialized"])
def test_h100(forward):
    found = run_case("h100:1", "pallas_gpu", forward)
    assert "float32 is neither bfloat16 nor float16" in found.pop("float32")["error"]
    # Wide heads have separate kernels for dk and dv.
    check(found, backward_256=3)
