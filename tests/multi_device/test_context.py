"""Attention over rows that are cut over devices equals attention on one device."""

import context_case
import mesh_case
import pytest
from test_meshes import TOLERANCE, check_gradients, run_child

B, T, N, K, H = 2, 64, 4, 2, 8


def check_cases(folder, *cases):
    result = run_child(context_case.main, folder, *cases)
    for case, found in result.items():
        wrong = {n: d for n, d in found["differences"].items() if d > TOLERANCE}
        assert wrong == {}, case
    return {case: found["sent"] for case, found in result.items()}


def check_ring(sent, devices):
    """Keys, values and segments visit all other devices, in either direction once.

    The gradients of keys and values go all the way round.
    """
    keys, segments = 2 * B * T // devices * K * H * 4, B * T // devices * 4
    others = devices - 1
    assert sent["permute"] == 2 * others * (keys + segments) + devices * keys
    assert "all-gather" not in sent


@pytest.mark.slow
def test_rows_that_are_cut(tmp_path):
    """Packed rows, a window, sinks, a soft cap and grouped heads at once."""
    sent = check_cases(
        tmp_path,
        *("ring 4", "gather 2, row order", "ring 2, heads 2", "gather 4"),
        "kernel in a ring of 2",
    )
    check_ring(sent["ring 4"], 4)
    assert "permute" not in sent["gather 2, row order"]
    assert sent["gather 4"]["all-gather"] >= 3 * (2 * B * T // 4 * K * H * 4)
    with pytest.raises(AssertionError):
        check_cases(tmp_path, "wrong order")


@pytest.mark.slow
def test_gradients_of_rows_that_are_cut(tmp_path):
    """Beside fsdp and tensor; windows, sinks, packed documents."""
    result = run_child(mesh_case.main, tmp_path, "context", tmp_path)
    check_gradients(result, ["fsdp2_context2_tensor2"])


@pytest.mark.nightly
def test_longer_rings(tmp_path):
    sent = check_cases(tmp_path, "ring 8", "gather 8")
    check_ring(sent["ring 8"], 8)
    result = run_child(mesh_case.main, tmp_path, "longer_rings", tmp_path)
    check_gradients(result, ["context4_tensor2", "context8"])
