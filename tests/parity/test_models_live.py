"""Compares all hidden states and logits, and the goldens, with transformers itself.

pytest -m parity
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_case import build
from hf_case import run as run_transformers
from parity_case import CASES, GOLDENS, HIDDEN_ROWS, LOGIT_ROWS, nested, tokens, weights
from test_goldens import GATE, run
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxlm.ops.experts.moe import load_balance_loss, route

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", CASES)
def test_all_hidden_states_and_logits(name):
    case = CASES[name]
    expected = run_transformers(build(name, case), case)
    ours = run(case, nested(weights(case)), tokens(case))
    for a, b in zip(ours, expected, strict=True):
        assert np.abs(a - b).max() <= GATE * max(1.0, b.std())
    stored = np.load(GOLDENS)
    logits, hidden = expected
    # Releases of torch may differ in the order of summation.
    np.testing.assert_allclose(logits[LOGIT_ROWS], stored[f"{name}/logits"], atol=1e-4)
    np.testing.assert_allclose(
        hidden[:, HIDDEN_ROWS], stored[f"{name}/hidden"], atol=2e-3
    )


@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_loss(masked):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2, 9, 6)).astype(np.float32)
    mask = np.ones((2, 9), np.float32)
    if masked:
        mask[0, :4] = 0.0
    theirs = load_balancing_loss_func(
        tuple(torch.tensor(layer).reshape(-1, 6) for layer in logits),
        num_experts=6,
        top_k=2,
        attention_mask=torch.tensor(mask) if masked else None,
    )
    logits = jnp.asarray(logits)
    _, experts = route(logits, 2, True)
    ours = load_balance_loss(logits, experts, jnp.asarray(mask))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
