"""Where parameters and activations lie in a mesh."""

import dataclasses
import functools

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import tree
from jaxlm.config import MeshConfig, ModelConfig
from jaxlm.model.initialization import init
from jaxlm.model.params import parameter_shardings, weight_of
from jaxlm.sharding import rules
from jaxlm.sharding.mesh import AXES

BASE = ModelConfig(
    vocab_size=64,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=64,
    context_length=16,
)
# In the manner of: Llama, Qwen 2, Qwen 3, OLMo 2, GPT-2, GPT-NeoX, Gemma 2, gpt-oss,
# the original Transformer, Mixtral with the biases of gpt-oss.
VARIANTS = {
    "dense": {},
    "untied": {"tied_embeddings": False},
    "qkv_biases": {"attention_bias": True},
    "head_norms": {"qk_norm": "head"},
    "full_norms": {"qk_norm": "full", "norm_placement": "output"},
    "learned": {
        "position": "learned",
        "norm": "layer",
        "norm_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
        "gated": False,
    },
    "parallel": {"parallel_block": True, "norm": "layer", "norm_bias": True},
    "sandwich": {
        "norm_placement": "both",
        "norm": "rms_unit_offset",
        "layer_pattern": ("local", "global"),
        "window": 4,
    },
    "sinks": {"attention_sinks": True, "attention_output_bias": True},
    "post": {"norm_placement": "post", "final_norm": False, "norm": "layer"},
    "experts": {
        "num_experts": 6,
        "experts_per_token": 2,
        "router_bias": True,
        "feed_forward_bias": True,
    },
}
# Matrices without a second axis that is cut.
BATCH = ("data", "fsdp", "expert")
ONLY_FSDP = ("embed/positions", "layers/moe/router")


def abstract_mesh(data=1, fsdp=1, tensor=1, kind=AxisType.Explicit, **more):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, **more)
    sizes = dataclasses.astuple(config)
    return AbstractMesh(sizes, AXES, axis_types=(kind,) * len(AXES))


def shapes_of(**changes):
    return _shapes(dataclasses.replace(BASE, **changes))


@functools.cache
def _shapes(config):
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_layout(variant):
    shapes = tree.flatten(shapes_of(**VARIANTS[variant]))
    mesh = abstract_mesh(2, 2, 2)
    shardings = tree.flatten(parameter_shardings(shapes_of(**VARIANTS[variant]), mesh))
    assert shardings.keys() == shapes.keys()
    for name, sharding in shardings.items():
        assert isinstance(sharding, NamedSharding), name
        # Every weight matrix is cut by both axes; only vectors are not.
        big = len(shapes[name].shape) - name.startswith("layers/") >= 2
        cut = {axis for entry in sharding.spec if entry for axis in (entry,)}
        if big and "bias" not in name and "norm" not in name:
            wanted = {"fsdp"} if name in ONLY_FSDP else {"fsdp", "tensor"}
            if name.startswith("layers/moe/") and name not in ONLY_FSDP:
                wanted = wanted | {"expert"}
            assert cut == wanted, name


def test_the_layouts_by_name():
    """Written out, because an exchange of two axes would still divide everything."""
    mesh = abstract_mesh(1, 2, 2)
    shapes = shapes_of(tied_embeddings=False, attention_bias=True, qk_norm="full")
    specs = {
        name: sharding.spec
        for name, sharding in tree.flatten(parameter_shardings(shapes, mesh)).items()
    }
    assert specs["embed/table"] == P("tensor", "fsdp")
    assert specs["lm_head/kernel"] == P("fsdp", "tensor")
    for name in "qkv":
        assert specs[f"layers/attn/{name}"] == P(None, "fsdp", "tensor", None)
        assert specs[f"layers/attn/{name}_bias"] == P(None, "tensor", None)
    assert specs["layers/attn/o"] == P(None, "tensor", None, "fsdp")
    assert specs["layers/attn/q_norm/scale"] == P(None, "tensor", None)
    assert specs["layers/mlp/gate"] == P(None, "fsdp", "tensor")
    assert specs["layers/mlp/up"] == P(None, "fsdp", "tensor")
    assert specs["layers/mlp/down"] == P(None, "tensor", "fsdp")
    assert specs["layers/attn_norm/scale"] == P(None, None)
    assert specs["final_norm/scale"] == P(None)


def test_the_layouts_of_experts_by_name():
    """The router has the logits of all experts on each device."""
    shapes = shapes_of(**VARIANTS["experts"])
    shardings = tree.flatten(parameter_shardings(shapes, abstract_mesh(1, 2, 2)))
    found = {
        name.removeprefix("layers/moe/"): sharding.spec
        for name, sharding in shardings.items()
        if name.startswith("layers/moe/")
    }
    assert found == {
        "router": P(None, "fsdp", None),
        "router_bias": P(None, None),
        "gate": P(None, "expert", "fsdp", "tensor"),
        "up": P(None, "expert", "fsdp", "tensor"),
        "down": P(None, "expert", "tensor", "fsdp"),
        "gate_bias": P(None, "expert", "tensor"),
        "up_bias": P(None, "expert", "tensor"),
        "down_bias": P(None, "expert", None),
    }


def test_a_parameter_without_a_rule_is_refused():
    extra = jax.ShapeDtypeStruct((2, 3), "float32")
    shapes = tree.replace(shapes_of(), "layers/attn/q", {"of_a_new_kind": extra})
    with pytest.raises(
        ValueError, match=r"no weight 'layers/attn/q/of_a_new_kind'.*add it to"
    ):
        parameter_shardings(shapes, abstract_mesh())
    # The right name with another rank is another parameter.
    flat = jax.ShapeDtypeStruct((2, 32, 32), "float32")
    with pytest.raises(ValueError, match=r"no weight 'layers/attn/q' of shape"):
        weight_of("layers/attn/q", flat)
    with pytest.raises(ValueError, match=r"no weight 'xlayers/attn/q'"):
        weight_of("xlayers/attn/q", flat)


def test_two_dimensions_on_one_mesh_axis_are_refused():
    for axes in (("heads", "hidden"), ("batch", "model"), ("vocab", "vocab")):
        with pytest.raises(ValueError, match=r"put two dimensions on '(tensor|fsdp)'"):
            rules.spec(*axes)
    assert rules.spec("batch", None, "heads") == P(BATCH, None, "tensor")
    with pytest.raises(KeyError):
        rules.spec("no_such_axis")


@pytest.mark.parametrize(
    "axis, size, name",
    [("tensor", 3, "layers/attn/"), ("tensor", 8, "layers/attn/"), ("fsdp", 5, "")],
)
def test_an_axis_that_does_not_divide_names_parameter_and_remedy(axis, size, name):
    with pytest.raises(
        ValueError,
        match=rf"mesh\.{axis} is {size}, which does not divide \d+ in the shape .*"
        rf"'{name}.*choose another mesh\.{axis} or another size",
    ):
        parameter_shardings(shapes_of(), abstract_mesh(**{axis: size}))


def test_a_batch_is_cut_by_data_and_fsdp():
    assert rules.batch_sharding(abstract_mesh(2, 2, 2)).spec == P(BATCH, None)
    with jax.sharding.use_abstract_mesh(abstract_mesh(2, 4, 3)):
        assert rules.batch_parts() == 8
        assert rules.activation_spec("BT") == P(BATCH, None)


def test_rows_are_cut_by_context():
    mesh = abstract_mesh(fsdp=2, context=4)
    assert rules.batch_sharding(mesh).spec == P(BATCH, "context")
    with jax.sharding.use_abstract_mesh(mesh):
        assert rules.context_parts() == 4
        assert rules.activation_spec("BTD") == P(BATCH, "context", None)
    assert rules.context_parts() == 1


def test_without_a_mesh_nothing_is_laid_out():
    x = jax.numpy.ones((3, 2))
    assert rules.activation_spec("BT") is None
    assert rules.batch_parts() == 1
    assert rules.reshard(x, "BD") is x
    auto = abstract_mesh(kind=AxisType.Auto)
    with jax.sharding.use_abstract_mesh(auto):
        assert rules.activation_spec("BT") is None
