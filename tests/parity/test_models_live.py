"""All hidden states and logits against transformers itself, and the goldens' age.

PYTHONPATH=tests/parity pytest tests/parity -m parity
"""

import numpy as np
import pytest
from hf_case import run as run_transformers
from parity_case import CASES, GOLDENS, HIDDEN_ROWS, LOGIT_ROWS, nested, tokens, weights
from test_goldens import GATE, run

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", CASES)
def test_all_hidden_states_and_logits(name):
    case = CASES[name]
    expected = run_transformers(name, case)
    ours = run(case, nested(weights(case)), tokens(case))
    for a, b in zip(ours, expected, strict=True):
        assert np.abs(a - b).max() <= GATE * max(1.0, b.std())
    stored = np.load(GOLDENS)
    logits, hidden = expected
    # Another release of torch may sum in another order.
    np.testing.assert_allclose(logits[LOGIT_ROWS], stored[f"{name}/logits"], atol=1e-4)
    np.testing.assert_allclose(
        hidden[:, HIDDEN_ROWS], stored[f"{name}/hidden"], atol=2e-3
    )
