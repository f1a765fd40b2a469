"""Value-weighted attention and sinks, against the sums that they stand for."""

import jax.numpy as jnp
import numpy as np
from ops_case import normal

from jaxlm.interp.attention_maps import sink_mass, value_weighted


def test_value_weighted_is_the_length_of_what_is_added():
    L, B, N, K, T, H, D = 2, 2, 6, 3, 5, 4, 7
    probs, v, o = (
        abs(normal(0, L, B, N, T, T)),
        normal(1, L, B, T, K, H),
        normal(2, L, N, H, D),
    )
    repeated = np.repeat(v, N // K, axis=3)
    added = np.einsum("LBNTS,LBSNH,LNHD->LBNTSD", probs, repeated, o)
    wanted = np.linalg.norm(added, axis=-1)
    ours = value_weighted(*map(jnp.asarray, (probs, v, o)))
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)


def test_sink_mass():
    probs = abs(normal(0, 2, 1, 3, 5, 5))
    np.testing.assert_allclose(
        sink_mass(jnp.asarray(probs), 2), probs[..., 2:, :2].sum(-1).mean(-1), rtol=1e-5
    )
