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
    # Registers that did not suffice, and matrix instructions that wait for one another.
    words = "".join((child.stdout + child.stderr).split("Compile time")[:-1])
    assert bool(words) == arguments[0].startswith("h100"), "no word from ptxas"
    # Specialized kernels move registers from the producer to the consumers.
    if re.search("setmaxnreg.*ignored", words):
        pytest.fail(
            "this environment has an assembler (such as nvjitlink 13.5) that ignores "
            "setmaxnreg, so that it cannot judge: install the compilers alone, as in "
            ".ci/run"
        )
    # The gradient of keys keeps the most: at head_dim 128, with 240 registers (960 bytes),
    # specialized kernels write 68 to 136 bytes to memory, and were faster than the others
    # on an H100 with that. More would be a change that should be seen.
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", words)]
    assert max(spills, default=0) <= 136, spills
    assert "serialized" not in words
    return json.loads(child.stdout.splitlines()[-1])


def check(found, backward_256=2):
    """Every case compiles and has our kernels: one forward, and the backward ones."""
    assert {n: f["error"] for n, f in found.items() if "error" in f} == {}
    for name, case in found.items():
        kernels = 1 + (backward_256 if name == "256" else 2)
        assert case["kernels"] == (1 if name.startswith("decode") else kernels), name


def check_long_rows(found):
    # The [T, S] scores of one head would take 2 GiB in bf16.
    assert found["32k"]["temporaries_mib"] < 1024


# Of newer chips, which have no less of anything, the case with all options, and the one
# with other dtypes.
NEWER = ("everything", "decode int8")


@pytest.mark.parametrize(
    "target, names",
    [
        ("v5e:2x2", ()),
        ("v5p:2x2x1", NEWER),
        ("v6e:2x2", NEWER),
        pytest.param("v5p:2x2x1", (), marks=pytest.mark.nightly),
        pytest.param("v6e:2x2", (), marks=pytest.mark.nightly),
    ],
)
def test_tpu(target, names):
    found = run_case(target, "pallas_tpu", "auto", *names)
    check(found)
    if not names:
        check_long_rows(found)


# Of the plain kernels, with wide heads, the memory of long rows, and all options.
PLAIN = ("32k", "256", "float32", "everything")


@needs_cuda
@pytest.mark.parametrize(
    "kernels, names",
    [
        ("plain", PLAIN),
        ("specialized", ()),
        pytest.param("plain", (), marks=pytest.mark.nightly),
    ],
)
def test_h100(kernels, names):
    found = run_case("h100:1", "pallas_gpu", kernels, *names)
    assert "float32 is neither bfloat16 nor float16" in found.pop("float32")["error"]
    # Wide heads have separate kernels for dk and dv.
    check(found, backward_256=3)
    check_long_rows(found)
