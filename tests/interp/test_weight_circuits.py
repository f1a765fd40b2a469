"""Circuits, their norms and compositions, from the matrices themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_case import make, small

from jaxlm.interp.weight_circuits import (
    circuit_norms,
    composition,
    copying,
    ov_circuit,
    qk_circuit,
)

CONFIG, PARAMS = make(small())


def matrices(layer, head):
    attn = {name: np.float64(x) for name, x in PARAMS["layers"]["attn"].items()}
    q, o = attn["q"][layer, :, head], attn["o"][layer, head]
    k, v = attn["k"][layer, :, head // 2], attn["v"][layer, :, head // 2]
    return q @ k.T, v @ o


def test_circuits_and_norms():
    norms = circuit_norms(CONFIG, PARAMS)
    for layer, head in ((0, 5), (1, 2)):
        wanted = matrices(layer, head)
        ours = [f(CONFIG, PARAMS, layer, head) for f in (qk_circuit, ov_circuit)]
        for a, b, norm in zip(ours, wanted, norms, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
            assert norm[layer, head] == pytest.approx(np.linalg.norm(b), rel=1e-4)


def test_copying_is_1_for_a_projection():
    attn = PARAMS["layers"]["attn"]
    half = jnp.eye(24)[:, :8]
    v = attn["v"].at[1, :, 0].set(half)
    o = attn["o"].at[1, 0].set(half.T).at[1, 1].set(-half.T)
    params = {"layers": {"attn": {**attn, "v": v, "o": o}}}
    scores = copying(CONFIG, params)
    assert scores[1, 0] == pytest.approx(1) and scores[1, 1] == pytest.approx(-1)
    x = np.linalg.eigvals(matrices(0, 3)[1]).real
    assert scores[0, 3] == pytest.approx(x.sum() / np.abs(x).sum(), abs=1e-3)


@pytest.mark.parametrize("reader", "qkv")
def test_composition(reader):
    qk, ov = matrices(1, 4)
    reads = {"q": qk, "k": qk.T, "v": ov}[reader]
    ours = composition(CONFIG, PARAMS, reader, 1, 4)
    feeds = matrices(0, 1)[1]
    norms = np.linalg.norm(feeds) * np.linalg.norm(reads)
    wanted = np.linalg.norm(feeds @ reads) / norms
    assert ours[0, 1] == pytest.approx(wanted, rel=1e-4) and not ours[1].any()
    with pytest.raises(ValueError, match="give 'q', 'k' or 'v'"):
        composition(CONFIG, PARAMS, "z", 1, 4)
