"""Models that the tensor axis does not divide run in another form, and are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from toy_case import make_params, toy

from jaxlm import tree
from jaxlm.config import MeshConfig
from jaxlm.model import divisible
from jaxlm.model.divisible import check_sites, divisible_config, divisible_params
from jaxlm.model.initialization import init, init_cache
from jaxlm.model.params import parameter_shardings
from jaxlm.model.presets import preset
from jaxlm.model.transformer import forward, head_params, unembed
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.sharding.mesh import AXES, make_mesh


def use_mesh(fsdp=1, tensor=1):
    kinds = (AxisType.Explicit,) * len(AXES)
    sizes = dataclasses.astuple(MeshConfig(data=1, fsdp=fsdp, tensor=tensor))
    return jax.sharding.use_abstract_mesh(AbstractMesh(sizes, AXES, kinds))


@pytest.mark.parametrize(
    "heads, key_heads, vocabulary, tensor, wanted",
    [
        (32, 8, 128256, 16, (16, 128256)),  # Llama 3 8B
        (32, 8, 128256, 8, (8, 128256)),
        (12, 12, 50257, 2, (12, 50258)),  # GPT-2
        (4, 4, 257, 4, (4, 260)),
        (24, 6, 256, 4, (12, 256)),  # neither divides the other
        (12, 3, 256, 2, (6, 256)),
        (8, 1, 256, 8, (8, 256)),
    ],
)
def test_the_form_that_runs(heads, key_heads, vocabulary, tensor, wanted):
    config = toy(num_heads=heads, num_kv_heads=key_heads, vocab_size=vocabulary)
    assert divisible_config(config) is config  # without a mesh
    with use_mesh(tensor=tensor):
        found = divisible_config(config)
        assert divisible_config(found) is found
        cache = jax.eval_shape(lambda: init_cache(config, 1, 8))
        assert cache.layers.keys.shape[3] == wanted[0]
    assert (found.num_kv_heads, found.vocab_size) == wanted
    same = {"num_kv_heads": key_heads, "vocab_size": vocabulary}
    assert dataclasses.replace(found, **same) == config


def test_query_heads_that_the_axis_does_not_divide_are_refused():
    with (
        use_mesh(tensor=2),
        pytest.raises(
            ValueError, match=r"^mesh\.tensor is 2, .* model\.num_heads 9: choose a div"
        ),
    ):
        divisible_config(toy(num_heads=9, num_kv_heads=3))


@pytest.mark.slow
def test_it_computes_the_same(monkeypatch):
    """The form for a tensor axis of 4, on one device."""
    config = toy(
        num_heads=4,
        num_kv_heads=2,
        vocab_size=45,
        qk_norm="full",
        attention_bias=True,
    )
    wide = dataclasses.replace(config, num_kv_heads=4, vocab_size=48)
    tokens = np.arange(12).reshape(2, 6)
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        params = jax.tree.map(jnp.asarray, make_params(config))
        out = forward(config, params, tokens)
        wanted = out.logits

        def logits(params):
            return forward(wide, divisible_params(wide, params), tokens).logits

        found = logits(params)
        np.testing.assert_allclose(found[..., :45], wanted, atol=1e-5)
        # The head that the loss reads gives padding no probability.
        padded = divisible_params(wide, head_params(config, params))
        hidden = unembed(config, padded, out.hidden_states)
        np.testing.assert_allclose(hidden[..., :45], wanted, atol=1e-5)
        assert hidden.shape[-1] == 48 and (hidden[..., 45:] == -1e30).all()
        # Heads in another order are another model.
        monkeypatch.setattr(divisible, "_repeat", lambda x, axis, size: _tile(x, axis))
        assert np.abs(logits(params)[..., :45] - wanted).max() > 0.1


def _tile(x, axis):
    return jnp.concatenate([x, x], axis)


def test_its_parameters_are_stored_as_they_were():
    """They are cut along D, by both axes."""
    config = toy(num_heads=8, vocab_size=257)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    with use_mesh(fsdp=2, tensor=4):
        mesh = jax.sharding.get_abstract_mesh()
    shardings = tree.flatten(parameter_shardings(shapes, mesh))
    both = ("fsdp", "tensor")
    assert shardings["embed/table"].spec == P(None, both)
    assert shardings["lm_head/kernel"].spec == P(both, None)
    for name in "kv":
        assert shardings[f"layers/attn/{name}"].spec == P(None, both, None, None)
    assert shardings["layers/attn/q"].spec == P(None, "fsdp", "tensor", None)
    # Where D does not have as many parts, they are whole along the tensor axis.
    with use_mesh(fsdp=8, tensor=4):
        mesh = jax.sharding.get_abstract_mesh()
    shardings = tree.flatten(parameter_shardings(shapes, mesh))
    assert shardings["embed/table"].spec == P(None, "fsdp")


def test_a_published_model_beyond_its_key_heads():
    """Every sharding of the forward pass is checked, without devices."""
    config = dataclasses.replace(preset("llama3-8b"), vocab_size=128257)
    with use_mesh(fsdp=16, tensor=16):
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        shardings = parameter_shardings(shapes, jax.sharding.get_abstract_mesh())
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            shardings,
        )
        tokens = jax.ShapeDtypeStruct((16, 8), jnp.int32)
        out = jax.eval_shape(lambda p, t: forward(config, p, t).logits, params, tokens)
    assert out.shape == (16, 8, 128257)


def test_sites_that_have_another_shape_are_refused():
    config = toy(num_heads=8, vocab_size=257)
    with use_mesh(tensor=4):
        check_sites(config, (Tap("logits"), Tap("attn_probs"), Tap("q")), ())
        for taps, edits in (
            ((Tap("k_rot"),), ()),
            ((), (Edit("logits", "scale", 0.5),)),
        ):
            with pytest.raises(ValueError, match=r"^site '(k_rot|logits)' has another"):
                check_sites(config, taps, edits)
    check_sites(config, (Tap("k_rot"),), ())
