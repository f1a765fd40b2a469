"""Edits equal the same changes made in transformers with hooks.

pytest -m parity
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_case import blocks, build
from parity_case import CASES, nested, tokens, weights
from test_goldens import GATE

from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit

pytestmark = pytest.mark.parity

FAMILIES = (
    *("llama2-7b", "qwen3-0.6b", "gemma2-27b", "gemma3-27b", "olmo2-32b"),
    *("phi3-mini-128k", "gpt2-124m", "gpt_neox", "mixtral-8x7b", "qwen3-30b-a3b"),
    "gpt-oss-20b",
)
POSITIONS = (5, 40)
HEAD = 1


def part(block, *names):
    """The first submodule that has one of these names."""
    return next(getattr(block, name) for name in names if hasattr(block, name))


def change(vector, at):
    """A hook that adds a vector to the output of a module at some positions."""

    def hook(_module, _inputs, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x.view(1, -1, x.shape[-1])[:, list(at)] += torch.tensor(vector)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook


def silence(head, head_dim):
    """A hook that removes a head from the input of the output projection."""

    def hook(_module, inputs):
        x = inputs[0].clone()
        x[..., head * head_dim : (head + 1) * head_dim] = 0
        return (x, *inputs[1:])

    return hook


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_an_edited_model(name):
    c = dataclasses.replace(CASES[name], dtype="float32")
    draw = np.random.default_rng(3).normal(size=(3, c.model_dim)).astype(np.float32)
    edits = (
        Edit("attn_out", "add", draw[0], layer=0, position=POSITIONS),
        Edit("mlp_out", "add", draw[1], layer=1, position=POSITIONS[:1]),
        Edit("resid_post", "add", draw[2], layer=0, position=POSITIONS[1:]),
        Edit("z", "scale", 0.0, layer=1, head=HEAD),
    )
    model = build(name, c)
    first, second = blocks(model)[:2]
    names = ("self_attn", "attn", "attention")
    part(first, *names).register_forward_hook(change(draw[0], POSITIONS))
    mlp = part(second, "mlp", "block_sparse_moe")
    mlp.register_forward_hook(change(draw[1], POSITIONS[:1]))
    first.register_forward_hook(change(draw[2], POSITIONS[1:]))
    output = part(part(second, *names), "o_proj", "c_proj", "dense")
    output.register_forward_pre_hook(silence(HEAD, c.head_dim))
    with torch.no_grad():
        ids = torch.tensor(tokens(c)).long()
        expected = model(ids, use_cache=False).logits[0].numpy()

    params = jax.tree.map(jnp.asarray, nested(weights(c)))
    call = jax.jit(lambda p, e: forward(c, p, tokens(c), edits=e).logits[0])
    with jax.default_matmul_precision("highest"):
        ours, clean = (np.asarray(call(params, e)) for e in (edits, ()))
    gate = GATE * max(1.0, expected.std())
    assert np.abs(ours - expected).max() <= gate
    assert np.abs(clean - expected).max() > 100 * gate
    wrong = call(params, (*edits[:3], Edit("z", "scale", 0.0, layer=1, head=0)))
    assert np.abs(wrong - expected).max() > 100 * gate
