"""What `train.look_every` writes: a row that says how a sentence is read."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from model_case import make, small

from jaxlm.commands.training_run import looks
from jaxlm.commands.training_run.looks import make_looks
from jaxlm.config import Config, MeshConfig, TrainConfig
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.train.metrics import FIELDS

MODEL, PARAMS = make(small(vocab_size=257, context_length=256))


def config(text):
    return Config(model=MODEL, train=TrainConfig(look_every=1, look_text=text))


@pytest.mark.slow
def test_the_row_of_a_sentence():
    with jax.set_mesh(make_mesh_of_size(MeshConfig(data=1))):
        row = make_looks(config("abcd"), ByteTokenizer())(PARAMS)
    assert set(row) == set(FIELDS["look"])
    tokens = np.resize(np.array([97, 98, 99, 100]), 64)[None]
    sites = "resid_post", "attn_probs", "mlp_out_post"
    taps = tuple(Tap(site) for site in sites)
    out = jax.jit(partial(forward, MODEL, taps=taps))(PARAMS, tokens)
    p = np.asarray(jax.nn.softmax(out.logits[0, :4]))
    assert row["entropy"] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-4)
    probs = np.asarray(out.trace["attn_probs"][:, 0])
    before = np.mean([probs[:, :, t, t - 1] for t in range(1, 64)], axis=0)
    np.testing.assert_allclose(row["previous_heads"], before, atol=1e-4)
    assert row["previous"] == pytest.approx(before.max(), abs=1e-4)
    # What followed the same token: the keys 3, 7, 11 ... places before.
    after = [probs[:, :, t, t - 3 : 0 : -4].sum(-1) for t in range(4, 64)]
    np.testing.assert_allclose(row["induction_heads"], np.mean(after, 0), atol=1e-4)
    x = np.asarray(out.trace["resid_post"][:, 0, :4])
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + MODEL.norm_epsilon)
    lens = (x * PARAMS["final_norm"]["scale"]) @ PARAMS["embed"]["table"].T
    first, last = np.asarray(lens).argmax(-1)
    assert row["lens_depth"] == pytest.approx(np.where(first == last, 1, 2).mean())
    # Without what a feed-forward adds, and with the same divisor, the logits that follow
    # are lower by as much.
    stream = np.asarray(out.trace["resid_post"][-1, 0, :3], np.float64)
    divisor = np.sqrt(np.square(stream).mean(-1, keepdims=True) + MODEL.norm_epsilon)

    def over_the_mean(x):
        gain, table = PARAMS["final_norm"]["scale"], PARAMS["embed"]["table"]
        logits = x / divisor * np.asarray(gain) @ np.asarray(table).T
        return np.mean(logits[np.arange(3), tokens[0, 1:4]] - logits.mean(-1))

    for layer, memory in enumerate(row["memory_layers"]):
        without = stream - np.asarray(out.trace["mlp_out_post"][layer, 0, :3])
        lost = over_the_mean(stream) - over_the_mean(without)
        assert memory == pytest.approx(lost, abs=1e-4)
    assert row["memory"] == pytest.approx(sum(row["memory_layers"]), abs=1e-3)


def test_a_mesh_that_cuts_rows_is_refused_before_the_first_look(monkeypatch):
    monkeypatch.setattr(looks.rules, "context_parts", lambda: 2)
    with pytest.raises(ValueError, match=r"look-every needs .*--mesh.context 2 cuts"):
        make_looks(config("abcd"), ByteTokenizer())


def test_a_sentence_that_cannot_be_read():
    with pytest.raises(ValueError, match=r"--train.look-text is empty.*look-every 0"):
        make_looks(config(""), ByteTokenizer())
    with pytest.raises(ValueError, match="look_every"):
        dataclasses.replace(TrainConfig(), look_every=-1)
