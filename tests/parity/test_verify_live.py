"""`jaxlm verify` against transformers itself.

PYTHONPATH=tests/parity pytest tests/parity -m parity
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from default_case import run_of
from parity_case import CASES, nested, weights

from jaxlm import load
from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.gguf import gguf_model as gguf
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.cli import main
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.verify import comparing, peer
from jaxlm.verify.find_reference import Subject, find_reference
from jaxlm.verify.verification import verify

pytestmark = pytest.mark.parity
CONFIG = dataclasses.replace(CASES["qwen3-0.6b"], vocab_size=257)


def params_of(config, flat=None):
    return jax.tree.map(jnp.asarray, nested(weights(config) if flat is None else flat))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live") / "model"
    write_hf(folder, CONFIG, params_of(CONFIG), ByteTokenizer())
    return folder


def test_a_folder_and_then_its_certificate(model, capsys, monkeypatch):
    main(["verify", str(model)])
    out, _ = capsys.readouterr()
    assert "transformers " in out and "which read the same files itself" in out
    assert out.count("passed") == 9 and "32 of 32 alike" in out, out
    lines = []
    load(model, report=lines.append)
    assert "verified against transformers" in lines[0]
    # Without torch, the values in the certificate are enough.
    monkeypatch.setattr(peer, "installed", lambda *names: False)
    main(["verify", str(model)])
    out, _ = capsys.readouterr()
    assert out.count("passed") == 9 and "its values are kept in" in out, out


def test_a_run_of_the_default_model(tmp_path, capsys):
    """Its vocabulary lacks most characters, and its export has another scale."""
    main(["verify", str(run_of(tmp_path / "run"))])
    out, _ = capsys.readouterr()
    assert "which read what jaxlm wrote for it" in out
    assert out.count("passed") == 9 and "have characters that it lacks" in out, out


def reference_of(path, config):
    """Finds the reference of a model without a tokenizer, for tokens drawn at random."""
    checkpoint = open_checkpoint(path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 96, np.int32)
    params = checkpoint.params(dtype=jnp.float32)
    return find_reference(
        Subject(checkpoint, config, params, None, tokens), None, print
    )


# All families give transformers' logits in `test_models_live.py`.
@pytest.mark.parametrize(
    "name",
    [
        "gpt2-124m",
        pytest.param("gpt-oss-20b", marks=pytest.mark.nightly),
        pytest.param("gemma2-27b", marks=pytest.mark.nightly),
        pytest.param("gemma3-27b", marks=pytest.mark.nightly),
        pytest.param("llama-dynamic", marks=pytest.mark.nightly),
        pytest.param("qwen3-moe-shares", marks=pytest.mark.nightly),
    ],
)
def test_other_families(name, tmp_path):
    config = dataclasses.replace(CASES[name], dtype="float32")
    if name == "llama-dynamic":  # Its files only allow a context of 2 * 48.
        config = dataclasses.replace(config, context_length=96)
    write_hf(tmp_path / "m", config, params_of(config), None)
    params = open_checkpoint(tmp_path / "m").params(dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        expected = reference_of(tmp_path / "m", config).expected
        assert expected is not None
        ours = comparing.full_pass(config, params, expected.tokens)
        for reference in (expected, expected.sample()):
            checks = comparing.compare_with(reference, config, ours)
            assert [c.passed for c in checks] == [True] * 3, checks
        assert comparing.compare_greedy(expected, config, params).passed


def test_a_gguf_file_by_export_and_by_transformers_own_reader(tmp_path, monkeypatch):
    # transformers' reader derives the head size from the width of the model.
    config = dataclasses.replace(CASES["qwen2-0.5b"], vocab_size=257, model_dim=9 * 16)
    config = dataclasses.replace(config, num_heads=9)
    file = tmp_path / "m.gguf"
    gguf.write_model(file, config, params_of(config), ByteTokenizer(), "f32")
    if peer.installed(*peer.NEEDED_FOR_GGUF):
        found = verify(file, report=print)
        assert found.passed, str(found)
        assert "which read the same file itself" in str(found)
        other = tmp_path / "other.gguf"
        gguf.write_model(other, CONFIG, params_of(CONFIG), ByteTokenizer(), "f32")
        found = reference_of(other, dataclasses.replace(CONFIG, dtype="float32"))
        assert found.expected is not None
        assert "(transformers reports mismatched keys in " in found.about
    installed = peer.installed
    monkeypatch.setattr(peer, "installed", lambda *n: "gguf" not in n and installed(*n))
    found = verify(file, report=print)
    assert found.passed, str(found)
    assert "computes, but does not read, independently" in str(found)


def test_damaged_weights_against_the_original(model, tmp_path, capsys):
    flat = weights(CONFIG)
    flat["layers/attn/q"][1, :, 0] = np.roll(flat["layers/attn/q"][1, :, 0], 1, axis=-1)
    write_hf(tmp_path / "bad", CONFIG, params_of(CONFIG, flat), ByteTokenizer())
    assert main(["verify", str(tmp_path / "bad"), "--against", str(model)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "layer 1 (" in out and "no tie" in out
    assert certificate.read(open_checkpoint(tmp_path / "bad"))["passed"] is False


def test_no_code_of_a_model_is_run(tmp_path):
    folder = tmp_path / "m"
    write_hf(folder, CONFIG, params_of(CONFIG), None)
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(values))
    mark = tmp_path / "was here"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    assert peer.TransformersModel(folder).name.startswith("transformers")
    assert not mark.exists()


def test_weights_that_transformers_would_randomize_are_an_error(model, tmp_path):
    config = dataclasses.replace(CONFIG, num_layers=CONFIG.num_layers + 1)
    write_hf(tmp_path / "m", CONFIG, params_of(CONFIG), None)
    file = tmp_path / "m" / "config.json"
    values = json.loads(file.read_text())
    values["num_hidden_layers"] = config.num_layers
    values["layer_types"] = ["full_attention"] * config.num_layers
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="missing keys"):
        peer.TransformersModel(tmp_path / "m")
