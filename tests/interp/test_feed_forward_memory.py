"""Units that write a token are found, and promote it."""

import jax
import jax.numpy as jnp
import numpy as np
from model_case import ids, make, small

from jaxlm.interp.feed_forward_memory import promoted_tokens, strongest_units
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit

CONFIG, PARAMS = make(small(norm="rms_unit_offset"))


def test_the_strongest_units_are_those_of_all_layers():
    parts = np.zeros((3, 5), np.float32)
    parts[2, 4], parts[0, 1], parts[1, 0] = -3.0, 2.0, 1.0
    best = strongest_units(jnp.asarray(parts), 3)
    assert best.layers.tolist() == [2, 0, 1] and best.units.tolist() == [4, 1, 0]
    assert best.parts.tolist() == [-3.0, 2.0, 1.0]


def test_what_a_unit_promotes_is_what_it_adds_to_the_logits():
    """Finite differences: the last layer's unit fires a bit more, the divisor stays."""
    raised_ids, raised = promoted_tokens(
        CONFIG, PARAMS, jnp.array([1]), jnp.array([7]), 32
    )
    div = 3.0
    more = jnp.zeros((1, 4, 40)).at[..., 7].set(0.5)

    @jax.jit
    def run(params, x):
        edits = (
            Edit("mlp_act", "add", x, layer=1),
            Edit("final_norm_div", "set", div),
        )
        return forward(CONFIG, params, ids(1, 4), edits=edits).logits[0, -1]

    logits = [run(PARAMS, x) for x in (more, 0 * more)]
    change = np.asarray(logits[0] - logits[1]) * div / 0.5
    np.testing.assert_allclose(
        raised[0], change[raised_ids[0]], atol=1e-4 * np.abs(change).max()
    )
    assert (np.diff(raised[0]) <= 0).all()
    lowered, _ = promoted_tokens(
        *(CONFIG, PARAMS, jnp.array([1]), jnp.array([7]), 32), signs=jnp.array([-2.0])
    )
    np.testing.assert_array_equal(lowered[0], raised_ids[0][::-1])
