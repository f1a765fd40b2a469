"""Every weight of the model, described once.

`WEIGHTS` is the contract between the model, checkpoints, sharding, optimizers and tools
that look inside. Initialization, partitions, weight decay, Muon's axes, the casts of
decoding, FLOP counts and the page `docs/params.md` are made from it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from jaxlm import tree
from jaxlm.config import ModelConfig, WeightKind
from jaxlm.ops.layout import reshape
from jaxlm.ops.quantization import quantize_weight
from jaxlm.sharding import rules
from jaxlm.types import OutputsFirst, Params, Quantized

Initializer = Callable[..., Array]


class Role(Enum):
    """What a weight does: decides how it is trained, cast and counted."""

    EMBEDDING = "embedding"
    """A table of rows to look up (and the output head, when tied)."""
    MATRIX = "matrix"
    """A projection inside a layer."""
    ROUTER = "router"
    """The projection that chooses experts; always used in f32."""
    HEAD = "head"
    """The output head."""
    NORM = "norm"
    """Gain or bias of a norm."""
    BIAS = "bias"
    """Added to a projection, or the logit of an attention sink."""

    @property
    def multiplies(self) -> bool:
        """True for matmul weights, which get weight decay."""
        return self in (Role.MATRIX, Role.ROUTER, Role.HEAD)


@dataclass(frozen=True)
class Condition:
    """Which models have a weight."""

    words: str
    """In terms of `ModelConfig`, for the docs."""
    holds: Callable[[ModelConfig], bool]

    def __and__(self, other: "Condition") -> "Condition":
        if self is ALWAYS:
            return other
        return Condition(
            f"{self.words}, {other.words}", lambda c: self.holds(c) and other.holds(c)
        )


ALWAYS = Condition("always", lambda c: True)
LEARNED = Condition('`position="learned"`', lambda c: c.position == "learned")
UNTIED = Condition("not `tied_embeddings`", lambda c: not c.tied_embeddings)
DENSE = Condition("without experts", lambda c: not c.num_experts)
EXPERTS = Condition("with experts (`num_experts` > 0)", lambda c: bool(c.num_experts))
GATED = Condition("`gated`", lambda c: c.gated)
QKV_BIAS = Condition("`attention_bias`", lambda c: c.attention_bias)
OUTPUT_BIAS = Condition("`attention_output_bias`", lambda c: c.attention_output_bias)
MLP_BIAS = Condition("`feed_forward_bias`", lambda c: c.feed_forward_bias)
ROUTER_BIAS = Condition("`router_bias`", lambda c: c.router_bias)
SINKS = Condition("`attention_sinks`", lambda c: c.attention_sinks)
HEAD_NORM = Condition('`qk_norm="head"`', lambda c: c.qk_norm == "head")
FULL_NORM = Condition('`qk_norm="full"`', lambda c: c.qk_norm == "full")
MAIN_NORM = Condition(
    "`norm_placement` pre, post, both", lambda c: c.norm_placement != "output"
)
OUTPUT_NORM = Condition(
    "`norm_placement` output, both", lambda c: c.norm_placement in ("output", "both")
)
FINAL_NORM = Condition("`final_norm`", lambda c: c.final_norm)
NORM_BIAS = Condition("`norm_bias`", lambda c: c.norm_bias)


def _embedding(config: ModelConfig, fan_in: int) -> Initializer:
    return nn.initializers.normal(config.init_std)


def _projection(config: ModelConfig, fan_in: int) -> Initializer:
    return nn.initializers.normal(_std(config, fan_in))


def _residual(config: ModelConfig, fan_in: int) -> Initializer:
    """For projections that add to the residual stream (GPT-2, section 2.3)."""
    std = _std(config, fan_in) / math.sqrt(2 * config.num_layers)
    return nn.initializers.normal(std)


def _head(config: ModelConfig, fan_in: int) -> Initializer:
    zeros = config.init == "fan_in"
    return nn.initializers.zeros if zeros else _projection(config, fan_in)


def _gain(config: ModelConfig, fan_in: int) -> Initializer:
    offset = config.norm == "rms_unit_offset"
    return nn.initializers.zeros if offset else nn.initializers.ones


def _zeros(config: ModelConfig, fan_in: int) -> Initializer:
    return nn.initializers.zeros


def _std(config: ModelConfig, fan_in: int) -> float:
    return config.init_std if config.init == "normal" else fan_in**-0.5


@dataclass(frozen=True)
class Weight:
    """One entry of the table."""

    path: str
    """Path in the tree of parameters; everything below `layers` is stacked."""
    letters: str
    """Dimensions of one layer's weight, in the letters of `types.py`; a matmul weight
    has `inputs -> outputs`. A leading `E:` means one per expert."""
    role: Role
    init: Callable[[ModelConfig, int], Initializer]
    """Returns the initializer, given the config and the fan-in."""
    present: Condition

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def stacked(self) -> str:
        """Leading letters that stack independent weights (layers, experts)."""
        layer = "L" if self.path.startswith("layers/") else ""
        return layer + ("E" if ":" in self.letters else "")

    @property
    def _own(self) -> str:
        return self.letters.rpartition(":")[2].replace(" ", "")

    @property
    def dimensions(self) -> str:
        """Letters of the stacked array, e.g. `LDNH`."""
        return self.stacked + self._own.replace("->", "")

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of each dimension; vectors are not sharded along D."""
        axes = rules.logical_axes(self.dimensions)
        if "E" not in self.stacked:  # the router has logits for all experts
            axes = tuple(None if axis == "experts" else axis for axis in axes)
        if "->" in self.letters or self.role is Role.EMBEDDING:
            return axes
        return tuple(None if axis == "model" else axis for axis in axes)

    @property
    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Dimension numbers of a matmul weight's inputs and of its outputs."""
        inputs, arrow, outputs = self._own.partition("->")
        assert arrow, f"{self.path} multiplies nothing"
        first = len(self.stacked)
        middle, end = first + len(inputs), first + len(inputs) + len(outputs)
        return tuple(range(first, middle)), tuple(range(middle, end))

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the stacked array, of a device's own experts."""
        size = sizes(config)
        named = zip(self.dimensions, self.axes, strict=True)
        return tuple(rules.own_size(size[letter], axis) for letter, axis in named)

    def initializer(self, config: ModelConfig) -> Initializer:
        """Returns `(key, shape) -> array`, f32."""
        shape = self.shape(config)
        inputs = self.matrix_axes[0] if "->" in self.letters else ()
        return self.init(config, math.prod(shape[axis] for axis in inputs))


def sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of each letter that occurs in the table."""
    return {
        "V": config.vocab_size,
        "C": config.context_length,
        "D": config.model_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.hidden_dim,
        "L": config.num_layers,
        "E": config.num_experts,
    }


def _norm(path: str, letters: str, present: Condition) -> tuple[Weight, Weight]:
    return (
        Weight(f"{path}/scale", letters, Role.NORM, _gain, present),
        Weight(f"{path}/bias", letters, Role.NORM, _zeros, present & NORM_BIAS),
    )


def _with_bias(
    path: str,
    letters: str,
    bias: str,
    init: Callable[[ModelConfig, int], Initializer],
    present: Condition,
    has_bias: Condition,
) -> tuple[Weight, Weight]:
    """Describes a projection inside a layer, and its bias."""
    return (
        Weight(path, letters, Role.MATRIX, init, present),
        Weight(f"{path}_bias", bias, Role.BIAS, _zeros, present & has_bias),
    )


# Initial values depend on the order within a folder, so add new entries at its end.
WEIGHTS: tuple[Weight, ...] = (
    Weight("embed/table", "V D", Role.EMBEDDING, _embedding, ALWAYS),
    Weight("embed/positions", "C D", Role.EMBEDDING, _embedding, LEARNED),
    *_with_bias("layers/attn/q", "D -> N H", "N H", _projection, ALWAYS, QKV_BIAS),
    *_norm("layers/attn/q_norm", "H", HEAD_NORM),
    *_norm("layers/attn/q_norm", "N H", FULL_NORM),
    *_with_bias("layers/attn/k", "D -> K H", "K H", _projection, ALWAYS, QKV_BIAS),
    *_norm("layers/attn/k_norm", "H", HEAD_NORM),
    *_norm("layers/attn/k_norm", "K H", FULL_NORM),
    *_with_bias("layers/attn/v", "D -> K H", "K H", _projection, ALWAYS, QKV_BIAS),
    Weight("layers/attn/sinks", "N", Role.BIAS, _zeros, SINKS),
    *_with_bias("layers/attn/o", "N H -> D", "D", _residual, ALWAYS, OUTPUT_BIAS),
    *_with_bias("layers/mlp/up", "D -> F", "F", _projection, DENSE, MLP_BIAS),
    *_with_bias("layers/mlp/gate", "D -> F", "F", _projection, DENSE & GATED, MLP_BIAS),
    *_with_bias("layers/mlp/down", "F -> D", "D", _residual, DENSE, MLP_BIAS),
    Weight("layers/moe/router", "D -> E", Role.ROUTER, _projection, EXPERTS),
    Weight("layers/moe/router_bias", "E", Role.BIAS, _zeros, EXPERTS & ROUTER_BIAS),
    *_with_bias(
        "layers/moe/gate", "E: D -> F", "E: F", _projection, EXPERTS & GATED, MLP_BIAS
    ),
    *_with_bias("layers/moe/up", "E: D -> F", "E: F", _projection, EXPERTS, MLP_BIAS),
    *_with_bias("layers/moe/down", "E: F -> D", "E: D", _residual, EXPERTS, MLP_BIAS),
    *_norm("layers/attn_norm", "D", MAIN_NORM),
    *_norm("layers/attn_output_norm", "D", OUTPUT_NORM),
    *_norm("layers/mlp_norm", "D", MAIN_NORM),
    *_norm("layers/mlp_output_norm", "D", OUTPUT_NORM),
    *_norm("final_norm", "D", FINAL_NORM),
    Weight("lm_head/kernel", "D -> V", Role.HEAD, _head, UNTIED),
)
_quantize = jax.jit(quantize_weight, static_argnums=(1, 2))
_BY_PATH_AND_RANK = {(w.path, len(w.dimensions)): w for w in WEIGHTS}
# Matrices of a layer that multiply the same activation.
_JOINED = (("attn", ("q", "k", "v")), ("mlp", ("gate", "up")))
_MATRICES = {
    w.path: w
    for w in WEIGHTS
    if w.role in (Role.MATRIX, Role.HEAD) and "E" not in w.stacked
}


@lru_cache
def weights(config: ModelConfig) -> dict[str, Weight]:
    """Returns the weights of a model, by path."""
    return {w.path: w for w in WEIGHTS if w.present.holds(config)}


def weight_of(path: str, leaf: Any) -> Weight:
    """Returns the entry for a leaf of a parameter tree (an array or a shape).

    Raises:
      ValueError: when no weight has that path and rank.
    """
    rank = len(leaf.shape)
    if (path, rank) not in _BY_PATH_AND_RANK:
        raise ValueError(
            f"no weight {path!r} of shape {tuple(leaf.shape)} is described: add it to "
            "WEIGHTS in jaxlm/model/params.py"
        )
    return _BY_PATH_AND_RANK[path, rank]


def param(module: nn.Module, path: str) -> Any:
    """Declares the weight `path` in a module; below `layers`, that of one layer.

    It is an array, or `Quantized` or `OutputsFirst` if it was made so.

    Args:
      module: has a `config`, and sits where `path` says in the tree.
    """
    config, weight = module.config, weights(module.config)[path]
    assert path.endswith("/".join((*module.path, weight.name))), (path, module.path)
    one_layer = weight.shape(config)[weight.stacked.count("L") :]
    if not module.has_variable("params", weight.name):
        return module.param(weight.name, weight.initializer(config), one_layer)
    # Not `module.param`: Flax would compare the shape in memory.
    value = module.get_variable("params", weight.name)
    assert value.shape == one_layer, (path, value.shape, one_layer)
    if isinstance(value, OutputsFirst) and value.source is not None:
        source = module.get_variable("params", value.source)
        value = replace(value, values=source.values, source=None)
    return value


def parameter_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns a tree of `NamedSharding` for stacked parameters (arrays or shapes).

    Raises:
      ValueError: when a weight is not in the table, or a mesh axis does not divide it.
    """

    def sharding(path: str, leaf: Any):
        return rules.sharding(path, leaf.shape, weight_of(path, leaf).axes, mesh)

    return tree.map_with_name(sharding, params)


def cast_matrices(params: Any, dtype: Any) -> Any:
    """Casts to `dtype` the weights that the model would cast before use.

    Norms, routers and sinks are used in f32; they and the biases stay as they are, and
    so do quantized weights and parameters that a block of one's own adds.

    Args:
      params: stacked.
    """
    roles = (Role.EMBEDDING, Role.MATRIX, Role.HEAD)

    def cast(path: str, x: Array | Quantized) -> Array | Quantized:
        weight = _BY_PATH_AND_RANK.get((path, x.ndim))
        if isinstance(x, Quantized) or not weight or weight.role not in roles:
            return x
        return x.astype(dtype)

    return tree.map_with_name(cast, params)


def quantize_matrices(params: Params, kind: str) -> Params:
    """Rounds the matrices, the table of tokens and the head to fewer bits.

    The model then multiplies by the integers. Norms, routers, biases, learned positions
    and parameters that a block of one's own adds stay as they are.

    Args:
      params: stacked.
      kind: `int8`: a scale for each output; `int4`: one for each 32 values, with the
        table and the head in int8, as they lose most; `float` changes nothing.

    Raises:
      ValueError: for a kind that does not exist.
    """
    kinds = get_args(WeightKind)
    if kind not in kinds:
        raise ValueError(f"weights is {kind!r}: choose one of {', '.join(kinds)}")

    def quantized(path: str, x: Array | Quantized) -> Array | Quantized:
        weight = _BY_PATH_AND_RANK.get((path, x.ndim))
        if weight is None or isinstance(x, Quantized):
            return x
        if weight.role is Role.MATRIX:
            return _quantize(x, weight.matrix_axes[0], kind)
        if weight.role is Role.HEAD:
            return _quantize(x, weight.matrix_axes[0], "int8")
        return _quantize(x, (1,), "int8") if path == "embed/table" else x

    return params if kind == "float" else tree.map_with_name(quantized, params)


def with_outputs_first(params: Params) -> Params:
    """Returns parameters whose matrices lie in memory as [outputs, inputs].

    Those that multiply the same activation lie in one array (`_JOINED`). Those of
    experts and routers stay as they are.

    Args:
      params: on one device; their `layers` are a tuple, one tree for each layer.
    """

    def turn(path: str, x: Array | Quantized) -> Array | Quantized | OutputsFirst:
        weight = _MATRICES.get(re.sub(r"^layers/\d+/", "layers/", path))
        if weight is None:
            return x
        inputs, outputs = map(len, weight.matrix_axes)
        order = (*range(inputs, inputs + outputs), *range(inputs))

        def lay(leaf: Array) -> Array:
            leaf = leaf.transpose(order)
            flat = (math.prod(leaf.shape[:outputs]), *leaf.shape[outputs:])
            return reshape(leaf, flat, (None,) * len(flat))

        return OutputsFirst(jax.tree.map(lay, x), x.shape, outputs)

    turned = tree.map_with_name(turn, params)
    return {**turned, "layers": tuple(map(_joined, turned["layers"]))}


def _joined(layer: Params) -> Params:
    """Lays the matrices of a layer that are in `_JOINED` behind one another."""
    layer = dict(layer)
    for folder, names in _JOINED:
        found = [layer.get(folder, {}).get(name) for name in names]
        arrays = [x.values for x in found if isinstance(x, OutputsFirst)]
        if len(arrays) < len(names) or any(isinstance(x, Quantized) for x in arrays):
            continue
        ends = np.cumsum([len(x) for x in arrays]).tolist()
        marks = [
            replace(x, values=None, first=first, source=names[0])
            for x, first in zip(found, [0, *ends], strict=False)
        ]
        marks[0] = replace(marks[0], values=jnp.concatenate(arrays), source=None)
        layer[folder] = {**layer[folder], **dict(zip(names, marks, strict=True))}
    return layer


def count_matmul_params(config: ModelConfig) -> int:
    """Counts the parameters that take part in a matmul for each token.

    These are the projections of attention and feed-forward and the output head (also
    when tied), without the embedding lookup, norms and biases. Of a mixture of experts
    they are the router and the experts that a token goes through.

    Raises:
      ValueError: when model.vocab_size is not set.
    """
    if config.vocab_size == 0:
        raise ValueError(
            "model.vocab_size is 0: give the size of the tokenizer to count FLOPs"
        )
    total = 0
    for weight in weights(config).values():
        size = math.prod(weight.shape(config))
        if "E" in weight.stacked:
            size = size // config.num_experts * config.experts_per_token
        total += size if weight.role.multiplies else 0
    return total + config.tied_embeddings * config.vocab_size * config.model_dim
