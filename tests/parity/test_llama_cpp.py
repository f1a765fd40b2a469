"""llama.cpp runs our GGUF files and generates the same tokens, for each architecture.

Needs the package xllamacpp, which is llama.cpp in a wheel.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from default_case import TEXT, default_model
from gguf_case import NAMES, small
from parity_case import nested, weights

from jaxlm.checkpoint.gguf.gguf_model import write_model
from jaxlm.config import SampleConfig
from jaxlm.infer.generate import generate
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.tokenizers.hugging_face.bpe_trainer import train_bpe

pytestmark = pytest.mark.slow

NEW = 24
# llama.cpp's server drops incomplete characters, so only ASCII tokens are allowed.
# It runs with an f32 cache and without flash attention, so nothing is rounded to f16.
ASCII = 127

SERVER = """
import json, sys
import xllamacpp

path, prompt, new, banned = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = path, 128, 1
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
result = xllamacpp.Server(params).handle_completions({
    "prompt": prompt, "n_predict": new, "temperature": 0, "n_probs": 1,
    "ignore_eos": True, "logit_bias": [[i, False] for i in banned],
})
result = json.loads(result) if isinstance(result, (str, bytes)) else result
print(json.dumps([c["id"] for c in result["choices"][0]["logprobs"]["content"]]))
"""


def model(name):
    return dataclasses.replace(small(name), vocab_size=257, dtype="float32")


def llama_cpp_tokens(path, prompt, banned=range(ASCII, 257)):
    arguments = json.dumps([str(path), prompt, NEW, list(banned)])
    done = subprocess.run(
        [sys.executable, "-c", SERVER, arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(tmp_path, name):
    config = model(name)
    flat = weights(config)
    params = jax.tree.map(jnp.asarray, nested(flat))
    # With the new tokens, longer than every window and every unscaled length.
    prompt = np.random.default_rng(3).integers(32, ASCII, 60).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        ours = generate(
            *(config, params, [prompt]),
            SampleConfig(temperature=0.0, max_new_tokens=NEW),
            jax.random.key(0),
            num_tokens=ASCII,
        ).tokens[0]
    write_model(tmp_path / "m.gguf", config, params, ByteTokenizer(), "f32")
    assert llama_cpp_tokens(tmp_path / "m.gguf", prompt.tolist()) == ours.tolist()


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_the_default_model_continues_text(tmp_path, kind):
    """What README's first command trains: llama.cpp splits text as jaxlm does."""
    trained = None if kind == "chars" else train_bpe([TEXT * 2], 280)
    config, params, tokenizer = default_model(trained)
    text = 'We are citizens; naïve 漢字 😀 \\n "it\'s"\t{[]}:\n'
    if trained is not None:
        text += "IT'LL 12345 ²x \r\n\n <|x|>"
        # Logits of 0: these, which are no whole characters, are never the largest.
        parts = [
            i
            for i, b in enumerate(tokenizer.token_bytes)
            if not 31 < max(b, default=0) < 127
        ]
        kernel = params["lm_head"]["kernel"]
        params["lm_head"]["kernel"] = kernel.at[:, np.array(parts)].set(0.0)
    with jax.default_matmul_precision("highest"):
        ours = generate(
            *(config, params, [tokenizer.encode(text)]),
            SampleConfig(temperature=0.0, max_new_tokens=NEW),
            jax.random.key(0),
        ).tokens[0]
    write_model(tmp_path / "m.gguf", config, params, tokenizer, "f32")
    assert llama_cpp_tokens(tmp_path / "m.gguf", text, range(0)) == ours.tolist()


def test_rows_in_the_wrong_order_would_show(tmp_path):
    """The comparison detects a wrong layout of the query heads."""
    config = model("smollm2-135m")
    flat = weights(config)
    prompt = np.random.default_rng(3).integers(32, ASCII, 60).tolist()
    found = []
    for shift in (0, 1):
        moved = {**flat, "layers/attn/q": np.roll(flat["layers/attn/q"], shift, -1)}
        params = jax.tree.map(jnp.asarray, nested(moved))
        write_model(tmp_path / "m.gguf", config, params, ByteTokenizer(), "f32")
        found.append(llama_cpp_tokens(tmp_path / "m.gguf", prompt))
    assert found[0] != found[1]
