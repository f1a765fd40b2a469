"""The Python of the README and of docs/python.md, run from top to bottom."""

import contextlib
import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hugging_face_case import golden_tokenizer

import jaxlm
from jaxlm.checkpoint.gguf import gguf_model
from jaxlm.tokenizers.bytes_and_characters import CharTokenizer

ROOT = Path(__file__).parents[2]
SIZES = dict(
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    hidden_dim=64,
    context_length=128,
)


def blocks(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    # Fewer tokens are the same calls.
    short = re.compile(r"max_new_tokens=\d+")
    return [short.sub("max_new_tokens=4", block) for block in found]


def random_model(vocab_size: int):
    """A model in the dtype of the machine; its parameters are drawn without JAX."""
    config = jaxlm.ModelConfig(vocab_size=vocab_size, **SIZES)
    draw = np.random.default_rng(0).normal
    shapes = jax.eval_shape(lambda: jaxlm.init(config, jax.random.key(0)))
    return config, jax.tree.map(
        lambda leaf: draw(size=leaf.shape).astype(leaf.dtype), shapes
    )


@pytest.fixture
def folder(tmp_path, monkeypatch, shakespeare):
    """The working folder of a reader who has trained, and downloaded a chat model."""
    tokenizer = CharTokenizer(set(shakespeare))
    model = random_model(tokenizer.vocab_size)
    jaxlm.save(tmp_path / "runs" / "shakespeare", *model, tokenizer)

    [path] = re.findall(r'path = "(.*\.gguf)"', (ROOT / "docs/python.md").read_text())
    assert path in (ROOT / "README.md").read_text()
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / "files").mkdir()
    tokenizer = golden_tokenizer("byte_level", tmp_path / "files")
    model = random_model(tokenizer.vocab_size)
    gguf_model.write_model(tmp_path / path, *model, tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.long
def test_blocks_of_looking_inside(monkeypatch, capsys):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    config, params = random_model(65)
    tokens = np.array([[1, 2, 3, 1, 2, 3, 4]], np.int32)
    names = {"config": config, "params": params, "tokens": tokens}
    names |= {"jax": jax, "jnp": jnp, "jaxlm": jaxlm, "partial": partial}
    for block in blocks("docs/inside.md"):
        exec(block, names)
    assert names["grid"].shape == names["estimate"].shape == (4, 7)
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # those of Jupyter
def test_blocks_in_a_notebook(folder):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(block)
        for block in [*blocks("README.md"), *blocks("docs/python.md")]
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PYTHONPATH", path)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        # Its own limits are for machines with nothing else to do: outputs that come
        # later would be left out.
        limits = dict.fromkeys(("timeout", "startup_timeout", "iopub_timeout"), 1000)
        client = NotebookClient(notebook, kernel_name="python3", **limits)
        client.execute(cwd=str(folder))
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "(4, 1, 4, 6, 6)\n" in text  # the README's attention
    assert "1,235,814,400 parameters\n" in text
    assert "(4, 32, 8)\n" in text  # the adapter
    assert "layers/mlp/up" in text and text.count("nats") == 4
    assert any("image/png" in output.get("data", {}) for output in outputs)
