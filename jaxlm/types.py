"""Types that all folders share, and the letters of shapes.

B batch, T query tokens, S key (cached) tokens, C context length, D model width,
N query heads, K key/value heads, G = N / K, H head dim, P rotary pairs of a head,
F feed-forward width, E experts, k experts of each token, V vocabulary, L layers.

The array fields of dataclasses that are JAX trees have the type `Any`: while JAX maps
over such a tree, a leaf may be a sharding, a boolean, None or anything else. Their
shapes and dtypes are documented, not checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

# Nested dict of arrays. The layout is the contract between model, checkpoints,
# sharding rules and optimizer masks; `docs/params.md` lists it.
Params = Mapping[str, Any]

# Probe site -> activations; sites inside layers have a leading axis of tapped layers.
# A tap with `top_k` keeps a `Largest`, of two arrays.
Trace = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of tokens and their prediction targets, as NumPy or JAX arrays."""

    tokens: Any
    """[B, T] int32: input ids."""
    targets: Any
    """[B, T] int32: the token that follows each input."""
    positions: Any
    """[B, T] int32: position in the document, from 0 at its first token in the row."""
    segment_ids: Any
    """[B, T] int32: index of the document in the row, from 1; 0 marks padding. None if
    each row is one document: padding at its end is not seen by what is before it."""
    loss_weights: Any
    """[B, T] f32: weight of each target in the loss; 0 leaves it out."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight in few bits: `values` times `scale`; see `ops/quantization.py`.

    In a tree of parameters it stands where the array would, and has its shape.
    """

    values: Any
    """int8 or int4, of the shape of the weight."""
    scale: Any
    """f32, with as many axes; each entry is that of a block of values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return self.values.ndim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputsFirst:
    """A matrix, [inputs, outputs], that lies in memory as [outputs, inputs].

    In a tree of parameters it stands where the array would, and has its shape. Several
    that multiply the same activation lie in one array, one behind the other.
    """

    values: Any
    """An array or `Quantized`, [all outputs, inputs]; None: that of `source`."""
    shape: tuple[int, ...] = field(metadata={"static": True})
    """Shape of the weight."""
    num_outputs: int = field(metadata={"static": True})
    """How many axes the outputs have."""
    first: int = field(default=0, metadata={"static": True})
    """Its first row of `values`."""
    source: str | None = field(default=None, metadata={"static": True})
    """The weight beside it, by name, that has the values of both."""

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)
