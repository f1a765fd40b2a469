"""The gate that licenses kernels, benchmarks/gpu_check.py, at small sizes on a CPU."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "benchmarks" / "gpu_check.py"
SPEC = importlib.util.spec_from_file_location("gpu_check", FILE)
assert SPEC is not None and SPEC.loader is not None
gpu_check = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_check"] = gpu_check
SPEC.loader.exec_module(gpu_check)


def test_a_license_needs_every_case():
    def licensed(*results):
        return gpu_check.licensed({"kernel": dict(enumerate(results))})

    passed, failed, declined = {"passed": True}, {"passed": False}, {"declined": "no"}
    assert licensed(passed, declined) == ["kernel"]
    assert licensed(passed, failed) == licensed(declined) == licensed() == []


def test_what_is_licensed_was_tested_at_real_sizes():
    found = gpu_check.cases("gpu", interpret=False)
    assert {case.head_dim for case in found} >= {64, 128}
    assert {case.length for case in found} == {2048}
    for name in ("pallas_gpu, plain", "pallas_gpu, specialized"):
        options = {case.option for case in found if case.implementation == name}
        assert options == set(gpu_check.OPTIONS)


def longer_window(spec):
    mask = dataclasses.replace(spec.mask, window=spec.mask.window + 1)
    return dataclasses.replace(spec, mask=mask)


def other_scale(spec):
    return dataclasses.replace(spec, scale=1.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wrong", [("pallas_gpu, plain", longer_window), ("pallas_tpu", other_scale)]
)
def test_a_right_kernel_passes_and_a_wrong_one_does_not(name, wrong):
    """One check judges every kernel."""
    (case,) = [
        case
        for case in gpu_check.cases(name[7:10], interpret=True)
        if (case.implementation, case.option) == (name, "all options")
    ]
    found = gpu_check.check(case, interpret=True)
    assert found["passed"] and found["same_twice"], found
    assert not gpu_check.check(case, interpret=True, wrong=wrong)["passed"]


@pytest.mark.slow
def test_specialized_kernels_pass():
    """In a process of the gate: their warpgroups wait for one another in threads."""
    (case,) = [
        case
        for case in gpu_check.cases("gpu", interpret=True)
        if (case.implementation, case.option)
        == ("pallas_gpu, specialized", "all options")
    ]
    ((_, found),) = gpu_check.check_all([case], ["--interpret", "gpu"], workers=1)
    assert found["passed"] and found["same_twice"], found


@pytest.mark.slow
def test_what_stalls_or_dies_has_failed(tmp_path, monkeypatch):
    """The process is replaced, and the next case is checked."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    option = json.loads(line)['option']\n"
        "    if option == 'dies': os.abort()\n"
        "    if option == 'stalls': time.sleep(600)\n"
        "    print(json.dumps({'passed': True}), flush=True)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(worker))
    real = gpu_check.Worker.check

    def check(process, case):
        # Others have time to start, however busy the machine is.
        seconds = 0.5 if case.option == "stalls" else 600
        monkeypatch.setattr(gpu_check, "STALL_SECONDS", seconds)
        return real(process, case)

    monkeypatch.setattr(gpu_check.Worker, "check", check)
    case = gpu_check.Case("kernel", 64, "")
    todo = [dataclasses.replace(case, option=x) for x in ("stalls", "dies", "right")]
    found = {c.option: r for c, r in gpu_check.check_all(todo, [], workers=1)}
    assert found["stalls"]["failure"] == "no result in 0.5 s"
    assert found["dies"]["failure"].startswith("the process ended with")
    assert found["right"] == {"passed": True}
    assert json.dumps(found)


def run_gate(platform, folder, monkeypatch):
    arguments = ["gpu_check.py", "--interpret", platform, "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_check.main()
    (file,) = folder.iterdir()
    found = json.loads(file.read_text())
    # What was interpreted licenses nothing, whatever passed.
    assert found["passed"] and found["licensed"] == []
    return found


def test_the_interpreter_licenses_nothing(tmp_path, monkeypatch):
    def pass_all(todo, flags, workers):
        return [(case, {"passed": True}) for case in todo]

    monkeypatch.setattr(gpu_check, "check_all", pass_all)
    run_gate("gpu", tmp_path, monkeypatch)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "platform, kernels",
    [
        ("gpu", ["pallas_gpu, plain", "pallas_gpu, specialized"]),
        ("tpu", ["pallas_tpu"]),
    ],
)
def test_the_whole_gate_passes_in_the_interpreter(
    platform, kernels, tmp_path, monkeypatch
):
    assert run_gate(platform, tmp_path, monkeypatch)["passed"] == kernels
