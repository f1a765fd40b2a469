"""`jaxlm look` and the page of `sample --look`, in process, on a small saved model."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from look_case import CONFIG, OTHER, PARAMS, TEXT, TOKENIZER

from jaxlm.checkpoint.hf.safetensors_file import write_safetensors
from jaxlm.checkpoint.save import save
from jaxlm.cli import main
from jaxlm.commands.generating.generation_page import write_generation
from jaxlm.commands.look import _lens
from jaxlm.config import SampleConfig
from jaxlm.flags.arguments import SampleArguments, read_arguments
from jaxlm.interp.jacobian_lens import read_jacobian_lens
from jaxlm.model.transformer import forward


def test_arguments():
    arguments = ["m", "--prompt", "a", "-o", "b.html"]
    (chosen,) = read_arguments("look", arguments, "jaxlm look")
    assert (chosen.run, str(chosen.out), chosen.dtype) == ("m", "b.html", "float32")
    with pytest.raises(ValueError, match="--prompt is missing"):
        read_arguments("look", ["m"], "jaxlm look")
    with pytest.raises(ValueError, match="--lens-text needs --lens"):
        read_arguments("look", [*arguments, "--lens-text", "a.txt"], "jaxlm look")


def data_of(path):
    text = path.read_text()
    data = text.split('<script type="application/json" id="data">')[1]
    return json.loads(data.split("</script>")[0])


@pytest.mark.slow
def test_the_page_of_a_text(tmp_path, capsys):
    run, page = tmp_path / "tiny", tmp_path / "look.html"
    save(run, CONFIG, PARAMS, TOKENIZER)
    # The texts of other tests, which have compiled for their length.
    text = ["look", str(run), "--prompt", TEXT, "--against", OTHER]
    lens, corpus = tmp_path / "lens.safetensors", tmp_path / "corpus.txt"
    corpus.write_text("some text " * 20)
    # The lens is made first.
    more = ["--lens", str(lens), "--lens-text", str(corpus)]
    assert main([*text, *more, "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    data = data_of(page)
    assert data["against"] == list(OTHER) and data["position"] == 8
    call = f"jaxlm look {run} --prompt '{TEXT}' --against '{OTHER}' --lens {lens}"
    assert data["call"] == call
    assert data["title"] == "tiny" and data["jacobian"] is not None
    rows = np.asarray(TOKENIZER.encode_prompt(TEXT))[None]
    logits = jax.jit(partial(forward, CONFIG))(PARAMS, rows).logits[0, -1]
    ours, theirs = data["causes"]["tokens"]
    difference = float(logits[ours] - logits[theirs])
    assert data["causes"]["difference"] == pytest.approx(difference, abs=1e-4)
    assert read_jacobian_lens(CONFIG, lens).any()
    # Weights whose name was given by mistake stay.
    write_safetensors(
        lens, {"other": ((1,), np.dtype("f4"))}, lambda _: np.ones(1, np.float32)
    )
    with pytest.raises(SystemExit):
        main([*text, *more])
    assert "is no Jacobian lens" in capsys.readouterr().err


def test_a_lens_is_made_only_where_it_can_be_written(tmp_path, monkeypatch):
    """It may take hours, and was lost."""
    made = []

    def fit(config, *_, **options):
        made.append(options)
        return np.ones((config.num_layers, *2 * [config.model_dim]), np.float32)

    monkeypatch.setattr("jaxlm.commands.look.fit_jacobian_lens", fit)
    rows = np.zeros((1, 8), np.int32)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        _lens(CONFIG, PARAMS, rows, tmp_path / "file" / "lens.safetensors")
    assert not made
    lens = tmp_path / "new" / "folder" / "lens.safetensors"
    assert _lens(CONFIG, PARAMS, rows, lens).any() and lens.is_file()


@pytest.mark.slow
def test_the_page_of_a_generation(tmp_path):
    page = tmp_path / "sample.html"
    chosen = SampleArguments(
        run="runs/tiny", look=page, sample=SampleConfig(temperature=0.0)
    )
    prompt, new = np.split(TOKENIZER.encode(TEXT), [7])
    write_generation(CONFIG, PARAMS, TOKENIZER, prompt, new, chosen)
    data = data_of(page)
    assert (data["position"], data["text"]["num_prompt"]) == (6, 7)
    assert [row["id"] for row in data["text"]["rows"]] == list(TEXT.encode())
    steps = data["choice"]["steps"]
    assert [step["rule"] for step in steps] == ["model", "temperature"]
    assert steps[-1]["kept"] == 1 and data["choice"]["settings"]["temperature"] == 0
