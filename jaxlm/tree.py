"""Pure functions over trees of arrays; selecting nothing is an error.

Where leaves have names, a `Quantized` or `OutputsFirst` weight is one leaf.
"""

import math
import re
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.types import OutputsFirst, Quantized


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a JAX key path as `layers/attn/q`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path name, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_weight)
    return {path_name(path): leaf for path, leaf in leaves}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nests leaves by path name: `{"a/b": x}` becomes `{"a": {"b": x}}`."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def map_with_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` for a function that takes each leaf's path name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves),
        *(tree, *rest),
        is_leaf=_is_weight,
    )


def _is_weight(x: Any) -> bool:
    return isinstance(x, Quantized | OutputsFirst)


def mask(tree: Any, patterns: Mapping[str, bool]) -> Any:
    """Returns for each leaf the boolean of the first pattern that matches its name.

    Args:
      patterns: regular expressions, searched for in path names, in order.

    Raises:
      ValueError: when a leaf matches no pattern or a pattern matches no leaf.
    """
    names = list(flatten(tree))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"pattern {pattern!r} matches none of: {', '.join(names)}")

    def value(name: str, _leaf: Any) -> bool:
        for pattern, result in patterns.items():
            if re.search(pattern, name):
                return result
        raise ValueError(f"no pattern matches the leaf {name!r}")

    return map_with_name(value, tree)


def replace(tree: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Returns a copy of a nested dict with the leaf or subtree `name` replaced.

    Raises:
      ValueError: when `name` does not exist.
    """
    head, _, rest = name.partition("/")
    if head not in tree:
        raise ValueError(f"no {head!r} among {', '.join(map(str, tree))}")
    return {**tree, head: replace(tree[head], rest, value) if rest else value}


def unstack(tree: Any, count: int) -> tuple[Any, ...]:
    """Splits a tree whose leaves are stacked, [count, ...], into `count` trees."""
    return tuple(jax.tree.map(itemgetter(i), tree) for i in range(count))


def count(tree: Any) -> int:
    """Number of elements in all leaves (arrays or shapes)."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def num_bytes(tree: Any) -> int:
    """Number of bytes in all leaves (arrays or shapes)."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts the floating-point leaves to `dtype` and keeps all others."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def global_norm(tree: Any) -> Float[Array, ""]:
    """Square root of the sum of squares over all leaves, in f32."""
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares))
