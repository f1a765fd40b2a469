"""The state of a generation, which a later call can go on from."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from jaxlm.config import CacheKind, ModelConfig
from jaxlm.model.block import Block
from jaxlm.model.kv_cache import Cache
from jaxlm.model.positions import max_fixed_rotation_length
from jaxlm.types import Params


@dataclass(frozen=True, eq=False)
class GenerationState:
    """The tokens of a batch and their cache, on the devices. It can be used once."""

    config: ModelConfig
    params: Params
    """As they were given: a state belongs to these very arrays."""
    block: type[Block]
    cache_kind: CacheKind
    max_length: int
    """Tokens for which each row has room."""
    spare: int
    """Room beyond it, and how many tokens that were taken back may be in the cache."""
    split_params: Params
    """One tree for each layer, as decoding reads them."""
    tokens: list[Int[np.ndarray, " _"]]
    """For each row the prompt and the tokens drawn after it, that which ended the text
    included; the last may be beyond the end of the cache."""
    cache: Cache
    """One layer each; overwritten by the call that goes on from it."""

    def delete(self) -> None:
        """Frees the cache, also where the devices did not reuse its memory."""
        for x in jax.tree.leaves(self.cache.layers):
            x.delete()

    def shared_lengths(self, rows: list[Int[np.ndarray, " _"]]) -> list[int]:
        """Returns how many tokens each row shares with the one in the cache.

        At least the last token of a row is left, for its logits.
        """
        longest = max_fixed_rotation_length(self.config)
        shared = []
        for row, held in zip(rows, self.tokens, strict=True):
            # A token that did not fit was written to the last index of the cache.
            most = min(len(row) - 1, len(held), self.max_length - 1)
            # Keys that a longer row would rotate differently must be computed again.
            if longest is not None and max(len(row), len(held)) > longest:
                most = 0
            differs = row[:most] != held[:most]
            shared.append(int(differs.argmax()) if differs.any() else most)
        return shared

    def still_held(self, kept: Int[np.ndarray, " B"]) -> bool:
        """Whether the cache has all that is seen after the first `kept` tokens.

        A ring has lost the oldest tokens, and what comes next may see some of them.
        """
        assert isinstance(self.cache.layers, tuple)
        rings = [x for x in self.cache.layers if x.window is not None]
        if not rings:
            return True
        # One more may have been written after the end of a text.
        written = np.array([len(row) for row in self.tokens]) + 1 + self.spare
        oldest = written - rings[0].keys.shape[1]
        return bool(((oldest <= 0) | (kept - rings[0].window >= oldest)).all())
