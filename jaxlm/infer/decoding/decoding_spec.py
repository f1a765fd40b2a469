"""What the programs of a model are compiled for."""

from dataclasses import dataclass, replace

import jax

from jaxlm.config import CacheKind, ModelConfig
from jaxlm.model.block import Block
from jaxlm.ops.linear import compute_dtype, reads_outputs_first


@dataclass(frozen=True)
class DecodingSpec:
    """A model, its cache, and what a step reports: all that is static."""

    config: ModelConfig
    max_length: int
    """Tokens for which each row of the cache has room."""
    kind: CacheKind = "full"
    """Of the cache."""
    num_top: int = 0
    """How many of the most likely tokens each step reports."""
    block: type[Block] = Block
    spare: int = 0
    """Room beyond `max_length`, for tokens that are taken back."""
    outputs_first: bool = False
    """`decode` reads matrices as [outputs, inputs] (`reads_outputs_first`)."""

    def for_rows(self, num_rows: int) -> "DecodingSpec":
        """Returns the spec for steps that read so many tokens at once."""
        on_one_device = jax.sharding.get_abstract_mesh().size <= 1
        dtype = compute_dtype(self.config.dtype)
        turned = on_one_device and reads_outputs_first(num_rows, dtype)
        return replace(self, outputs_first=turned)
