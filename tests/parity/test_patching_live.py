"""Cells of a sweep equal transformers patched with hooks.

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

from jaxlm.interp.causes.patching import activation_patching

pytestmark = pytest.mark.parity
GATE = 2e-5


@pytest.mark.parametrize("name", ["llama2-7b", "gemma2-27b", "gpt2-124m"])
def test_cells_of_a_sweep(name):
    c = dataclasses.replace(CASES[name], dtype="float32")
    text = np.asarray(tokens(c))
    other = np.roll(text, 7, axis=1)
    model = build(name, c)
    L, T = c.num_layers, text.shape[1]

    def run(ids, hook=None, layer=0):
        handle = hook and blocks(model)[layer].register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = model(torch.tensor(ids).long(), use_cache=False).logits
        if handle:
            handle.remove()
        return logits[0, -1].numpy()

    # The input of each block for the other text, by hooks that read.
    inputs = []
    for layer in range(L):
        run(other, lambda _, args: inputs.append(args[0].clone()), layer)

    params = jax.tree.map(jnp.asarray, nested(weights(c)))
    sweep = jax.jit(
        lambda p, x, s: activation_patching(c, lambda y: y[0, 3] - y[0, 4], p, x, s)
    )
    with jax.default_matmul_precision("highest"):
        grid = np.asarray(sweep(params, text, np.stack(inputs)))
    cells = [(n, at) for n in range(L) for at in (0, 3, T // 2, T - 2, T - 1)]

    def patch(layer, at):
        def hook(_module, args):
            x = args[0].clone()
            x[:, at] = inputs[layer][:, at]
            return (x, *args[1:])

        return hook

    logits = [run(text, patch(*cell), cell[0]) for cell in cells]
    wanted = np.array([x[3] - x[4] for x in logits])
    scale = max(1.0, np.abs(logits).max())
    ours = grid[tuple(np.array(cells).T)]
    assert np.abs(ours - wanted).max() <= GATE * scale
    assert np.ptp(wanted) > 100 * GATE * scale
