"""Converts every kind of checkpoint to every other, then trains and samples."""

import dataclasses
import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from default_case import TEXT as CHARACTERS
from default_case import default_model, run_of
from parity_case import nested, weights

from jaxlm import tree
from jaxlm.checkpoint.conversion import convert
from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.gguf import gguf_writing
from jaxlm.checkpoint.hf import hf_folder
from jaxlm.checkpoint.load import load, load_tokenizer, open_checkpoint
from jaxlm.checkpoint.save import save
from jaxlm.cli import main
from jaxlm.fields import diff
from jaxlm.flags.config_file import read_config
from jaxlm.model.presets import preset, toy
from jaxlm.model.transformer import forward
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

TEXT = "naïve 日本語\n  x = 12"
NAMES = {"hf": "m", "jaxlm": "m", "gguf": "m.gguf"}
MODEL = toy(preset("qwen3-0.6b"))
MODEL = dataclasses.replace(MODEL, vocab_size=257)


def params_of(config):
    return jax.tree.map(jnp.asarray, nested(weights(config)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A jaxlm run with a byte tokenizer."""
    run = tmp_path_factory.mktemp("runs") / "run"
    save(run, MODEL, params_of(MODEL), ByteTokenizer())
    return run


@pytest.fixture(scope="module")
def folder(run):
    """The same model as a Hugging Face folder."""
    folder = run.parent / "folder"
    assert convert(run, folder) == "hf"
    return folder


def same(a, b):
    first, second = (tree.flatten(load(path)[1]) for path in (a, b))
    assert set(first) == set(second)
    for path, x in first.items():
        assert np.array_equal(np.asarray(x), np.asarray(second[path])), path
    configs = [open_checkpoint(path).config for path in (a, b)]
    assert not diff(*configs, ignore=NOT_KEPT)
    ids = [load_tokenizer(path).encode(TEXT).tolist() for path in (a, b)]
    assert ids[0] == ids[1]


def test_weights_of_64_bits_are_read_with_a_line(tmp_path):
    config, params, tokenizer = default_model()
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    save(tmp_path / "run", config, wide, tokenizer)
    said = []
    load(open_checkpoint(tmp_path / "run", report=said.append))
    assert said == ["float64 weights are read as float32"]


def test_around_all_three_kinds(run, folder, tmp_path):
    same(run, folder)
    # Left by one that was interrupted.
    (tmp_path / "run/checkpoints/.tmp-0-1").mkdir(parents=True)
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/.tmp-probe-12-renamed").touch()
    assert convert(folder, tmp_path / "run") == "jaxlm"
    same(folder, tmp_path / "run")
    gguf = tmp_path / "m.gguf"
    assert convert(run, gguf, dtype="f32") == "gguf"
    same(run, gguf)
    assert convert(gguf, tmp_path / "back", to="hf") == "hf"
    same(gguf, tmp_path / "back")
    assert convert(tmp_path / "run", tmp_path / "again") == "hf"
    for name in sorted(p.name for p in folder.iterdir()):
        found = (tmp_path / "again" / name).read_bytes()
        assert found == (folder / name).read_bytes(), name
    found = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert found == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("to", ["hf", "jaxlm", "gguf"])
@pytest.mark.parametrize("where", ["", "0", "0/params"])
def test_no_file_is_written_among_the_steps_of_a_run(run, to, where):
    """They would be damage, or deleted with the step."""
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match="is inside of a"):
        convert(run, run / "checkpoints" / where / NAMES[to], to=to)
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_cannot_be_finished_is_not_in_the_way(run, tmp_path, monkeypatch):
    """The same command was refused then: the folder was there."""

    def fails(tokenizer, folder):
        raise OSError(errno.ENOSPC, "cannot write", str(folder / "tokenizer.json"))

    target = tmp_path / "m"
    with monkeypatch.context() as patch:
        patch.setattr(hf_folder, "write_hugging_face", fails)
        with pytest.raises(OSError) as failed:
            convert(run, target)
    assert failed.value.filename == str(target / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []
    convert(run, target)
    same(run, target)


def test_a_file_that_comes_by_the_name_meanwhile_is_not_replaced(
    run, tmp_path, monkeypatch
):
    target, real = tmp_path / "m.gguf", gguf_writing.write_values

    def write_values(file, values):
        target.write_text("mine")
        real(file, values)

    monkeypatch.setattr(gguf_writing, "write_values", write_values)
    with pytest.raises(OSError, match="it is there already, and stays"):
        convert(run, target)
    assert target.read_text() == "mine" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("to", ["hf", "jaxlm", "gguf"])
def test_dtypes(run, tmp_path, to):
    out = tmp_path / NAMES[to]
    convert(run, out, to=to, dtype="bf16")
    _, params = load(out)
    vectors = {x.dtype for x in jax.tree.leaves(params) if x.ndim == 2}
    matrices = {x.dtype for x in jax.tree.leaves(params) if x.ndim > 2}
    assert matrices == {jnp.dtype(jnp.bfloat16)}
    assert jnp.dtype(jnp.float32 if to == "gguf" else jnp.bfloat16) in vectors


@pytest.mark.parametrize(
    "to, dtype, limit",
    [
        pytest.param("hf", "f32", 0.0, marks=pytest.mark.slow),
        pytest.param("hf", "bf16", 2e-2, marks=pytest.mark.slow),
        pytest.param("gguf", "f32", 0.0, marks=pytest.mark.slow),
        pytest.param("gguf", "f16", 3e-3, marks=pytest.mark.slow),
        ("gguf", "q8_0", 6e-2),
    ],
)
def test_the_default_model(tmp_path, to, dtype, limit):
    """What README's first command trains; f32 files give the same bits."""
    config, params, tokenizer = default_model()
    out = tmp_path / NAMES[to]
    convert(run_of(tmp_path / "run"), out, to=to, dtype=dtype)
    back, found = load(out)
    assert back.embedding_scale == 1.0
    again = load_tokenizer(out)
    ids = tokenizer.encode(CHARACTERS)
    assert again.encode(CHARACTERS).tolist() == ids.tolist()
    assert again.decode(ids) == CHARACTERS and again.stop_ids == ()
    back = dataclasses.replace(back, dtype="float32")
    logits = forward(config, params, ids[None]).logits
    difference = jnp.abs(forward(back, found, ids[None]).logits - logits).max()
    assert difference <= limit * jnp.std(logits)


def test_no_cast_makes_infinities(tmp_path):
    params = params_of(MODEL)
    for large, wrong, right in ((1e5, "f16", "bf16"), (3.4e38, "bf16", "f32")):
        up = params["layers"]["mlp"]["up"]
        params["layers"]["mlp"]["up"] = up.at[0, 0, 0].set(large)
        run = tmp_path / wrong
        save(run, MODEL, params, ByteTokenizer())
        for kind, name in NAMES.items():
            with pytest.raises(ValueError, match="float16 cannot hold"):
                convert(run, tmp_path / f"{wrong}-{name}", to=kind, dtype=wrong)
        file = tmp_path / f"{right}.gguf"
        convert(run, file, dtype=right)
        assert np.isfinite(load(file)[1]["layers"]["mlp"]["up"]).all()


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_parameter_without_a_place_in_the_file_is_not_left_out(tmp_path, to):
    params = params_of(MODEL)
    layers = params["layers"] | {"adapter": jnp.ones((MODEL.num_layers, 3))}
    save(tmp_path / "run", MODEL, params | {"layers": layers}, ByteTokenizer())
    with pytest.raises(ValueError, match="params have layers/adapter, which"):
        convert(tmp_path / "run", tmp_path / NAMES[to], to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_matrices_that_are_not_quantized_are_told(run, tmp_path):
    lines = []
    narrow = dataclasses.replace(MODEL, hidden_dim=24)
    save(tmp_path / "run", narrow, params_of(narrow), ByteTokenizer())
    convert(tmp_path / "run", tmp_path / "f16.gguf", report=lines.append)
    assert not lines
    file = tmp_path / "q8.gguf"
    convert(tmp_path / "run", file, dtype="q8_0", report=lines.append)
    (line,) = lines
    assert "matrices are F16, as their rows are not whole blocks of 32" in line


def test_without_a_tokenizer(folder, tmp_path):
    main(["convert", str(folder), str(tmp_path / "m"), "--to", "hf", "--no-tokenizer"])
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path / "m")


ERRORS = {
    "existing": (["{folder}", "{folder}"], "already exists"),
    "no source": (["{tmp}/none", "{tmp}/x"], "it does not exist"),
    "only for GGUF": (["{folder}", "{tmp}/x", "--dtype", "q8_0"], "only for gguf"),
    "tokenizer of a run": (["{folder}", "{tmp}/x", "--no-tokenizer"], "cannot be left"),
    "unknown kind": (["{folder}", "{tmp}/x", "--too", "hf"], "did you mean '--to'"),
}


@pytest.mark.parametrize("fault", ERRORS)
def test_errors_are_one_line(folder, tmp_path, capsys, fault):
    words, message = ERRORS[fault]
    with pytest.raises(SystemExit) as raised:
        main(["convert", *(w.format(folder=folder, tmp=tmp_path) for w in words)])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_init_from_sets_the_model_of_the_config(folder, repository):
    file = repository / "configs" / "shakespeare.py"
    for words in (["--init-from", str(folder)], [f"--init-from={folder}"]):
        config, initial = read_config(words, file)
        assert initial.path == folder
        assert not diff(config.model, MODEL, ignore=NOT_KEPT)
        assert config.model.dtype == "auto"
    config, _ = read_config([*words, "--model.num-layers", "3"], file)
    assert config.model.num_layers == 3  # train.py then reports the difference


def test_init_from_a_path_that_is_not_a_checkpoint(tmp_path, repository):
    with pytest.raises(ValueError, match=r"^--init-from: "):
        read_config(
            ["--init-from", str(tmp_path)], repository / "configs" / "shakespeare.py"
        )


@pytest.mark.slow
def test_training_from_a_published_model_and_export(
    folder, tmp_path, repository, monkeypatch, capsys
):
    """Runs `jaxlm train --init-from`, `jaxlm convert` and `jaxlm sample` in turn."""
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 100)
    monkeypatch.chdir(tmp_path)
    words = [
        *("train", repository / "configs" / "finetune.py"),
        *("--init-from", folder, "--data.path", "text.txt", "--train.steps", "3"),
        *("--data.sequence-length", "32", "--optimizer.warmup-steps", "0"),
        *("--train.run-dir", "run", "--train.sample-every", "0"),
        *("--optimizer.learning-rate", "1e-3", "--model.dtype", "float32"),
    ]
    assert main([*map(str, words)]) == 0
    main(["convert", "run", "out"])
    before, after = load(folder)[1], load(tmp_path / "out")[1]
    moved = [
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    # Adam's first steps are about as large as the learning rate.
    assert 1e-3 < max(moved) < 1e-2
    capsys.readouterr()
    words = ["--prompt", "It was", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["sample", "out", *words]) == 0
    assert capsys.readouterr().out.startswith("It was")
