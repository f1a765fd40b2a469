"""Published layouts are read, and do what their papers say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import ids, make, small
from ops_case import normal
from safetensors.numpy import save_file

from jaxlm.interp.directions.sparse_autoencoder import (
    SparseAutoencoder,
    load_sparse_autoencoder,
)
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap

D, M = 24, 40
WEIGHTS = {
    "W_enc": normal(0, D, M),
    "b_enc": normal(1, M),
    "W_dec": normal(2, M, D),
    "b_dec": normal(3, D),
}
THRESHOLD = abs(normal(4, M))
GATED = {"b_gate": normal(5, M), "b_mag": normal(6, M), "r_mag": normal(7, M)}


def write(folder, config, **more):
    weights = dict(WEIGHTS)
    if config.get("architecture") == "gated":
        del weights["b_enc"]
    save_file({**weights, **more}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, **config}))
    return folder


def by_definition(x, kind):
    x = np.float64(x)
    pre = (x - WEIGHTS["b_dec"] * (kind == "standard")) @ WEIGHTS["W_enc"]
    own, pre = pre, pre + WEIGHTS["b_enc"]
    least = {
        "standard": 0.0,
        "jumprelu": THRESHOLD,
        "gated": -GATED["b_gate"],
        "topk": np.sort(pre, axis=-1)[..., -3, None] - 1e-9,
    }[kind]
    if kind == "gated":  # equations 3 to 6 of arXiv:2404.16014
        size = own * np.exp(GATED["r_mag"]) + GATED["b_mag"]
        features = (own > least) * np.maximum(size, 0)
    else:
        features = np.where((pre > 0) & (pre > least), pre, 0)
    return features, features @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"]


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
def test_layouts_of_sae_lens(tmp_path, kind):
    more = {"jumprelu": {"threshold": THRESHOLD}, "gated": GATED}.get(kind, {})
    config = {"architecture": kind, "apply_b_dec_to_input": kind == "standard", "k": 3}
    sae = load_sparse_autoencoder(write(tmp_path, config, **more))
    x = normal(9, 2, 5, D)
    features, output = by_definition(x, kind)
    ours = sae.encode(jnp.asarray(x))
    np.testing.assert_allclose(ours, features, atol=1e-4)
    np.testing.assert_allclose(sae(jnp.asarray(x)), output, atol=1e-3)
    if kind == "topk":
        assert int((ours > 0).sum(-1).max()) <= 3


def test_gemma_scope_and_the_model_that_it_stands_in_for(tmp_path):
    np.savez(tmp_path / "params.npz", threshold=THRESHOLD, **WEIGHTS)
    sae = load_sparse_autoencoder(tmp_path / "params.npz")
    config, params = make(small())

    @jax.jit
    def run(params, sae):
        call = jax.tree_util.Partial(SparseAutoencoder.__call__, sae)
        edits = (
            Edit("resid_post", "call", call, layer=0),
            Edit("mlp_out", "call", call, layer=1, reads="mlp_in"),
        )
        taps = tuple(Tap(site) for site in ("resid_post", "mlp_in", "mlp_out"))
        clean = forward(config, params, ids(1, 4), taps=taps).trace["resid_post"][0]
        out = forward(config, params, ids(1, 4), taps=taps, edits=edits)
        return clean, out.trace

    clean, edited = run(params, sae)
    wanted = by_definition(clean, "jumprelu")[1]
    np.testing.assert_allclose(edited["resid_post"][0], wanted, rtol=1e-3, atol=1e-2)
    # A transcoder is the feed-forward of its layer, in the same pass.
    wanted = by_definition(edited["mlp_in"][1], "jumprelu")[1]
    np.testing.assert_allclose(edited["mlp_out"][1], wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "config, more, message",
    [
        ({"architecture": "matryoshka"}, {}, "architecture 'matryoshka'"),
        ({"architecture": "gated"}, {}, "missing or unknown: b_gate, b_mag, r_mag"),
        ({"normalize_activations": "layer_norm"}, {}, "fold the factor"),
        ({"architecture": "topk", "k": 99}, {}, "k is 99"),
        ({}, {"W_skip": normal(5, D, D)}, "missing or unknown: W_skip"),
        ({"architecture": "jumprelu"}, {}, "missing or unknown: threshold"),
        ({}, {"b_enc": normal(5, M + 1)}, "shapes do not belong together"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, config, more, message):
    with pytest.raises(ValueError, match=message):
        load_sparse_autoencoder(write(tmp_path, config, **more))
