"""Published layouts are read, and give what sae_lens computes from them."""

import base64
import json
from pathlib import Path

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
GOLDENS = json.loads(Path(__file__).with_name("sae_lens_goldens.json").read_text())
KINDS = [name for name in GOLDENS if name != "sae_lens"]


def write(folder, config, **more):
    save_file({**WEIGHTS, **more}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, **config}))
    return folder


def by_definition(x):
    """A JumpReLU autoencoder's output: equation 3 of arXiv:2407.14435."""
    pre = np.float64(x) @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]
    features = np.where((pre > 0) & (pre > THRESHOLD), pre, 0)
    return features @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_sae_lens_give_its_features(tmp_path, kind):
    golden, path = GOLDENS[kind], tmp_path / "params.npz"
    if "cfg" in golden:
        (tmp_path / "cfg.json").write_text(json.dumps(golden["cfg"]))
        path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(base64.b64decode(golden["weights"]))
    sae = load_sparse_autoencoder(tmp_path if "cfg" in golden else path)
    features = sae.encode(jnp.array(golden["x"]))
    assert 0 < (features > 0).mean() < 1
    np.testing.assert_allclose(features, golden["features"], atol=1e-5)
    np.testing.assert_allclose(sae.decode(features), golden["output"], atol=1e-5)


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
    wanted = by_definition(clean)
    np.testing.assert_allclose(edited["resid_post"][0], wanted, rtol=1e-3, atol=1e-2)
    # A transcoder is the feed-forward of its layer, in the same pass.
    wanted = by_definition(edited["mlp_in"][1])
    np.testing.assert_allclose(edited["mlp_out"][1], wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "config, more, message",
    [
        ({"architecture": "matryoshka"}, {}, "architecture 'matryoshka'"),
        (
            {"architecture": "gated"},
            {},
            "missing or unknown: b_enc, b_gate, b_mag, r_mag",
        ),
        ({}, {"scaling_factor": THRESHOLD}, "missing or unknown: scaling_factor"),
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
