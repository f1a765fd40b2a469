"""What sites hold, and what edits change, equal transformers with hooks.

pytest -m parity
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_case import blocks, build
from hf_sites import ATTENTION, FEED_FORWARD, OUTPUT, part, read_sites
from parity_case import CASES, nested, tokens, weights
from test_goldens import GATE

from jaxlm.model.trace import absent_sites
from jaxlm.model.transformer import forward
from jaxlm.ops.attention.spec import MASKED
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.sites import SITES
from jaxlm.ops.probing.tap import Tap

pytestmark = pytest.mark.parity

FAMILIES = (
    *("llama2-7b", "qwen3-0.6b", "gemma2-27b", "gemma3-27b", "olmo2-32b"),
    *("phi3-mini-128k", "gpt2-124m", "gpt_neox", "mixtral-8x7b", "qwen3-30b-a3b"),
    "gpt-oss-20b",
)
POSITIONS = (5, 40)
HEAD = 1
SITE_GATE = 2e-5  # of the largest value of a site


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


def with_hook(module, hook, run):
    handle = module.register_forward_pre_hook(hook)
    found = run()
    handle.remove()
    return found


def distance(ours, theirs):
    """The largest difference, relative to the largest value, of what is not masked."""
    assert ours.shape == theirs.shape
    seen = theirs > MASKED
    assert np.array_equal(seen, ours > MASKED)
    return np.abs(ours - theirs)[seen].max() / np.abs(theirs[seen]).max()


def test_each_site_is_compared():
    compared = (set(SITES) - absent_sites(CASES[name]) for name in FAMILIES)
    assert set.union(*compared) == set(SITES)


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_and_logits_of_an_edited_model(name):
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
    output = part(part(second, *ATTENTION), *OUTPUT)

    def run():
        with torch.no_grad():
            ids = torch.tensor(tokens(c)).long()
            return model(ids, use_cache=False).logits[0].numpy()

    clean = run()
    part(first, *ATTENTION).register_forward_hook(change(draw[0], POSITIONS))
    mlp = part(second, *FEED_FORWARD)
    mlp.register_forward_hook(change(draw[1], POSITIONS[:1]))
    first.register_forward_hook(change(draw[2], POSITIONS[1:]))
    wrong = with_hook(output, silence(0, c.head_dim), run)
    sites = with_hook(output, silence(HEAD, c.head_dim), partial(read_sites, model, c))
    assert set(sites) == set(SITES) - absent_sites(c)

    params = jax.tree.map(jnp.asarray, nested(weights(c)))
    taps = tuple(Tap(site) for site in sites)
    call = jax.jit(lambda p: forward(c, p, tokens(c), taps=taps, edits=edits))
    with jax.default_matmul_precision("highest"):
        out = call(params)
    distances = {x: distance(np.asarray(out.trace[x]), sites[x]) for x in sites}
    assert not {x: d for x, d in distances.items() if not d <= SITE_GATE}
    ours, expected = np.asarray(out.logits[0]), sites["logits"][0]
    gate = GATE * max(1.0, expected.std())
    assert np.abs(ours - expected).max() <= gate
    # No edit, and another head, would be seen.
    for other in (clean, wrong):
        assert np.abs(ours - other).max() > 100 * gate
