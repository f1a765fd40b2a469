"""Parameters on a mesh, in the dtype of computing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_case import make_params, toy

from jaxlm.checkpoint.load import load_onto_mesh, open_checkpoint
from jaxlm.checkpoint.save import save
from jaxlm.config import MeshConfig
from jaxlm.model.transformer import forward
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer


@pytest.mark.slow
def test_matrices_in_the_dtype_of_computing_give_the_same_logits(tmp_path):
    config = toy(dtype="bfloat16", num_layers=1, vocab_size=257)
    save(tmp_path / "model", config, make_params(config), ByteTokenizer())
    checkpoint = open_checkpoint(tmp_path / "model")
    with jax.set_mesh(make_mesh_of_size(MeshConfig(data=1))):
        plain, cast = (load_onto_mesh(checkpoint, dtype=d) for d in (None, "bfloat16"))
        tokens = jnp.arange(6)[None]
        predict = jax.jit(lambda params: forward(config, params, tokens).logits)
        logits = [predict(params) for params in (plain, cast)]
    np.testing.assert_array_equal(*logits)
    assert cast["embed"]["table"].dtype == jnp.bfloat16
    assert cast["final_norm"]["scale"].dtype == jnp.float32
