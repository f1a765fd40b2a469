"""Tree functions select by path name, and fail when nothing matches."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tree


@jax.tree_util.register_dataclass
@dataclass
class Pair:
    first: object
    second: object


def params():
    return {
        "embed": {"table": jnp.ones((3, 2))},
        "layers": {"attn": {"q": jnp.ones((2, 4), jnp.bfloat16)}},
        "step": jnp.array(7),
    }


def test_names_of_dicts_tuples_and_dataclasses():
    nested = {"a": (Pair(1, [2]), 3), "b": {"c": 4}}
    assert tree.flatten(nested) == {
        "a/0/first": 1,
        "a/0/second/0": 2,
        "a/1": 3,
        "b/c": 4,
    }
    named = tree.map_with_name(lambda name, x, y: (name, x + y), {"b": 1}, {"b": 2})
    assert named == {"b": ("b", 3)}


def test_mask_takes_the_first_pattern_that_matches():
    masked = tree.mask(params(), {"attn": False, "e": True, "layers": True})
    assert tree.flatten(masked) == {
        "embed/table": True,
        "layers/attn/q": False,
        "step": True,
    }


def test_mask_fails_when_something_matches_nothing():
    with pytest.raises(ValueError, match=r"pattern 'mlp' matches none of: embed/table"):
        tree.mask(params(), {"mlp": True, ".": False})
    with pytest.raises(ValueError, match="no pattern matches the leaf 'step'"):
        tree.mask(params(), {"embed|layers": True})


def test_replace_copies_and_changes_one_leaf():
    before = params()
    after = tree.replace(before, "layers/attn/q", 1)
    assert after["layers"]["attn"]["q"] == 1
    assert after["embed"] is before["embed"]
    assert before["layers"]["attn"]["q"].shape == (2, 4)
    assert tree.replace(before, "layers", 2)["layers"] == 2
    for name in ("layer", "layers/mlp", "layers/attn/q_bias"):
        with pytest.raises(ValueError, match="no '"):
            tree.replace(before, name, 1)


def test_count_and_bytes_of_arrays_and_shapes():
    for leaves in (params(), jax.eval_shape(params)):
        assert tree.count(leaves) == 6 + 8 + 1
        assert tree.num_bytes(leaves) == 6 * 4 + 8 * 2 + 4


def test_cast_leaves_integers_alone():
    cast = tree.flatten(tree.cast_floating(params(), jnp.float16))
    assert [str(x.dtype) for x in cast.values()] == ["float16", "float16", "int32"]


def test_global_norm_is_summed_in_float32():
    leaves = {"a": jnp.full(4, 3.0), "b": jnp.full(1000, 0.1, jnp.bfloat16)}
    b = float(jnp.bfloat16(0.1))
    right = np.sqrt(4 * 9 + 1000 * b * b)
    assert tree.global_norm(leaves) == pytest.approx(right, rel=1e-6)
    assert tree.global_norm(leaves).dtype == jnp.float32
