"""A model of integers computes what one of the numbers that they stand for computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks_case import slow_but
from model_case import ids, make, small

from jaxlm import tree
from jaxlm.model.params import Role, quantize_matrices, weight_of
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.ops.quantization import dequantize_weight
from jaxlm.types import Quantized

MODELS = {
    "dense": small(position="learned", attention_bias=True, tied_embeddings=True),
    "experts": small(num_experts=4, experts_per_token=2, gated=True, head_dim=32),
}
TAPS = (Tap("head_out"), Tap("resid_post"), Tap("logits"))
EDITS = (Edit("mlp_out", "scale", 0.5, layer=1),)


@pytest.mark.parametrize("name", slow_but(["dense"], MODELS))
def test_the_integers_are_what_is_computed(name):
    config, params = make(MODELS[name])
    tokens = ids(2, 9)

    @jax.jit
    def run(params):
        out = forward(config, params, tokens, taps=TAPS, edits=EDITS)
        return out.logits, out.trace

    @jax.jit
    def dense(quantized):
        return tree.map_with_name(
            lambda _, x: dequantize_weight(x, jnp.float32), quantized
        )

    for kind in ("int8", "int4"):
        quantized = jax.jit(partial(quantize_matrices, kind=kind))(params)
        for path, leaf in tree.flatten(quantized).items():
            weight = weight_of(path, leaf)
            rounds = weight.role in (Role.MATRIX, Role.HEAD) or path == "embed/table"
            assert isinstance(leaf, Quantized) == rounds
        ours, right = run(quantized), run(dense(quantized))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), ours, right
        )
        assert np.abs(ours[0] - run(params)[0]).max() > 1e-3


def test_a_kind_that_does_not_exist():
    with pytest.raises(
        ValueError, match="weights is 'int2': choose one of float, int8"
    ):
        quantize_matrices({}, "int2")
