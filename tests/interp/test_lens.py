"""The lens of the last layer is the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_case import ids, make, small

from jaxlm.interp.jacobian_lens import (
    jacobian_lens,
    read_jacobian_lens,
    transported,
    write_jacobian_lens,
)
from jaxlm.interp.lens import (
    lens_depth,
    logit_lens,
    stream_norms,
)
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap


def test_the_lens_normalizes_and_the_last_layer_is_the_model():
    config, params = make(small(norm="layer", norm_bias=True, final_soft_cap=20.0))

    @jax.jit
    def run(params):
        out = forward(config, params, ids(2, 7), taps=(Tap("resid_post"),))
        stream = out.trace["resid_post"]
        return out.logits, stream, logit_lens(config, params, stream)

    logits, stream, lens = run(params)
    np.testing.assert_allclose(lens[-1], logits, atol=1e-4)
    x = np.float64(stream[0])
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
    norm, table = params["final_norm"], np.asarray(params["embed"]["table"])
    wanted = (x * norm["scale"] + norm["bias"]) @ table.T
    wanted = 20 * np.tanh(wanted / 20)
    np.testing.assert_allclose(lens[0], wanted, atol=1e-3)
    lengths = np.sqrt(np.square(np.float64(stream)).sum(-1))
    np.testing.assert_allclose(stream_norms(stream), lengths, rtol=1e-5)
    assert stream_norms(stream.astype(jnp.bfloat16)).dtype == jnp.float32


def test_the_depth_is_the_layer_from_which_the_answer_stays():
    choices = jnp.array([[7, 1, 7, 3], [5, 1, 5, 3], [7, 1, 7, 4], [7, 1, 8, 3]])
    assert lens_depth(choices).tolist() == [3, 1, 4, 4]


@pytest.mark.slow
def test_the_jacobian_lens_is_the_mean_derivative():
    """Against derivatives of the rest of the model, begun at each layer by itself."""
    config, params = make(small(num_layers=3))
    tokens, skip = ids(2, 5), 1
    taps = (Tap("resid_post"),)

    @jax.jit
    def run(params):
        stream = forward(config, params, tokens, taps=taps).trace["resid_post"]

        def end(x):
            given = dict(start=1, stream=x, taps=(Tap("resid_post", (2,)),), head=False)
            trace = forward(config, params, tokens, **given).trace
            return jnp.sum(trace["resid_post"][0, :, skip:], axis=(0, 1))

        wanted = jnp.mean(jax.jacrev(end)(stream[0])[:, :, skip:], axis=(1, 2))
        ours = jacobian_lens(config, params, tokens, skip=skip, batch_size=8)
        return stream, ours, wanted

    stream, ours, wanted = run(params)
    np.testing.assert_allclose(ours[0], wanted, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(ours[2], np.eye(24), atol=1e-6)
    moved = transported(ours, stream)
    np.testing.assert_allclose(
        moved[1, 0, 2], np.asarray(ours[1]) @ np.asarray(stream[1, 0, 2]), rtol=1e-3
    )


def test_a_lens_is_a_file(tmp_path):
    config, path = small(num_layers=2), tmp_path / "lens.safetensors"
    shape = 2, config.model_dim, config.model_dim
    jacobian = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    params = {"a": np.ones((2, 3), np.float32), "b": {"c": np.ones(3, np.float32)}}
    write_jacobian_lens(path, jacobian, params)
    for given in (None, params):
        read = read_jacobian_lens(config, path, given)
        np.testing.assert_array_equal(read, jacobian)
    with pytest.raises(ValueError, match="of another model, or of an earlier step"):
        read_jacobian_lens(config, path, {**params, "a": params["a"] + 1e-6})
    with pytest.raises(ValueError, match="lens of another model"):
        read_jacobian_lens(small(num_layers=3), path)
