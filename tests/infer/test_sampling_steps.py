"""What each rule leaves of a distribution, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import SampleConfig
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.sampling import filtered
from jaxlm.infer.sampling_steps import sampling_steps

PROBS = np.array([0.4, 0.3, 0.1, 0.1, 0.06, 0.04])
LOGITS = np.log(PROBS)


def test_each_rule_in_use_is_a_step():
    sample = SampleConfig(temperature=0.5, top_k=5, top_p=0.92, min_p=0.1)
    steps = sampling_steps(LOGITS, sample)
    assert [s.rule for s in steps] == [
        "model",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
    ]
    np.testing.assert_allclose(steps[0].probabilities, PROBS, rtol=1e-5)
    sharp = PROBS**2 / np.sum(PROBS**2)
    np.testing.assert_allclose(steps[1].probabilities, sharp, rtol=1e-5)
    assert steps[1].kept.all() and steps[1].removed == 0
    assert steps[2].removed == pytest.approx(sharp[5], rel=1e-4)
    five = sharp[:5] / sharp[:5].sum()
    np.testing.assert_allclose(steps[2].probabilities, [*five, 0], rtol=1e-5)
    # 0.58 and 0.33 are not 0.92; the two that tie are kept both.
    assert steps[3].kept.tolist() == [True] * 4 + [False] * 2
    assert steps[4].kept.tolist() == [True] * 2 + [False] * 4
    np.testing.assert_allclose(steps[4].probabilities[:2], [16 / 25, 9 / 25], rtol=1e-5)
    # What generation draws from.
    settings = jax.tree.map(jnp.asarray, row_settings([sample], 6))
    drawn = filtered(jnp.asarray(LOGITS[None]), jax.random.key(0)[None], settings)
    np.testing.assert_allclose(
        jax.nn.softmax(drawn)[0], steps[-1].probabilities, rtol=1e-6
    )


@pytest.mark.slow
def test_penalties_are_a_step_and_temperature_0_is_the_last():
    sample = SampleConfig(temperature=0.0, top_k=3, repetition_penalty=2.0)
    steps = sampling_steps(LOGITS, sample, prompt=[0], new_tokens=[3])
    assert [s.rule for s in steps] == ["model", "penalties", "temperature"]
    halved = np.where(np.isin(np.arange(6), [0, 3]), PROBS**2, PROBS)
    np.testing.assert_allclose(steps[1].probabilities, halved / halved.sum(), rtol=1e-5)
    assert steps[2].kept.tolist() == [False, True] + [False] * 4
    assert steps[2].removed == pytest.approx(1 - steps[1].probabilities[1], abs=1e-6)
