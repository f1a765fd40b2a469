"""A run saved by an earlier jaxlm loads, computes the same and continues."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import forward
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.commands.train import train
from jaxlm.config import Config
from jaxlm.fields import from_dict
from jaxlm.sharding.mesh import make_mesh
from jaxlm.train.metrics import read_metrics

FOLDER = Path(__file__).with_name("before_the_move")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def test_it_loads_and_gives_the_same_logits():
    checkpoint = open_checkpoint(FOLDER / "run")
    tokens = jnp.asarray([EXPECTED["tokens"]], jnp.int32)
    logits = forward(checkpoint.config, checkpoint.params(), tokens).logits[0]
    expected = np.asarray(EXPECTED["logits"], np.float32)
    # Equal bit for bit with the jax that wrote them. Other versions add in another order,
    # which changes sums over normalized states, of size one, by a few times 2**-23.
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=2**-21)
    tokenizer = checkpoint.tokenizer()
    text = (FOLDER / "text.txt").read_text()
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_it_continues_with_the_same_losses(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    config = from_dict(Config, json.loads(Path("run/config.json").read_text()), "run")
    with jax.set_mesh(make_mesh(config.mesh)):
        assert train(config) == 0
    rows = [r for r in read_metrics(Path("run")) if r["kind"] == "train"]
    losses = {str(r["step"]): r["loss"] for r in rows if r["step"] > 2}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-6)
