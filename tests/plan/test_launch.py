"""The configs for pods compile for their chips and fit the memory of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).parent / "launch_case.py"
# Config, target, attention, GiB of a chip.
RUNS = [
    ("llama_1b_v5e_16", "v5e:4x4", "splash", 15.75),
    ("llama_8b_v5p_64", "v5p:4x4x4", "splash", 95),
    ("llama_8b_h100_8", "h100:8", "pallas_gpu", 79),
]


def check(name, target, attention, gib, layers):
    child = subprocess.run(
        [sys.executable, CASE, name, target, attention, str(layers)],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout.splitlines()[-1])
    used = (found["arguments_mib"] + found["temporaries_mib"]) / 1024
    assert 0 < used < gib, found
    assert found["kernels"], found
    return found


@pytest.mark.aot
@pytest.mark.parametrize("name, target, attention, gib", RUNS)
def test_two_layers(name, target, attention, gib):
    check(name, target, attention, gib, layers=2)


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("name, target, attention, gib", RUNS)
def test_the_whole_model(name, target, attention, gib):
    check(name, target, attention, gib, layers=0)
