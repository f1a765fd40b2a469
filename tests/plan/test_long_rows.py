"""Rows of 131,072 tokens: a step of all 32 layers of an 8B model compiles and fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).parent / "launch_case.py"


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("attention, kernels", [("auto", 0), ("pallas_tpu", 16)])
def test_8b_on_64_chips_with_rows_cut_over_8(attention, kernels):
    """Recorded in benchmarks/results/long_rows.json. A v5p has 95 GiB."""
    arguments = ("llama_8b_131k_v5p_64", "v5p:4x4x4", attention, "0")
    child = subprocess.run(
        [sys.executable, CASE, *arguments], capture_output=True, text=True, timeout=3000
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert 0 < found["arguments_mib"] + found["temporaries_mib"] < 95 * 1024
    assert found["gib_sent"]["context parallelism"] > 0
    assert found["kernels"] == kernels
    # Added up along `context` when they are cut over fsdp: an eighth of each.
    assert found["gib_sent"]["gradients"] < 1.3 * found["gib_sent"]["layer weights"]
