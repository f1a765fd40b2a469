"""How each row of a batch is sampled, as arrays: other values compile nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.config import SampleConfig
from jaxlm.infer.rules.filters import NEVER


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSettings:
    """The `SampleConfig` of each row, field by field: [B], f32 or int32."""

    # `Any`: see `jaxlm/types.py` on leaves.
    max_new_tokens: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    typical_p: Any
    top_n_sigma: Any
    xtc_probability: Any
    xtc_threshold: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    no_repeat_ngram: Any
    dry_multiplier: Any
    dry_base: Any
    dry_allowed_length: Any
    min_new_tokens: Any
    bias: Any
    """[B, V] f32, added to the logits: `NEVER` for forbidden ids."""
    is_stop: Any
    """[B, V] bool: ids that end the text."""
    is_dry_breaker: Any
    """[B, V] bool: ids that no repetition contains."""


def row_settings(
    samples: Sequence[SampleConfig],
    vocab_size: int,
    token_bytes: Sequence[bytes] = (),
) -> RowSettings:
    """Returns the settings of rows, one config each, on the host.

    Args:
      token_bytes: the text of each id, in which `dry_breakers` are looked for.
    """
    bias = np.zeros((len(samples), vocab_size), np.float32)
    is_stop, is_dry_breaker = np.zeros((2, *bias.shape), bool)
    breaker_ids = {
        breakers: _ids_with(breakers, token_bytes)
        for breakers in {s.dry_breakers for s in samples if s.dry_multiplier}
    }
    for i, sample in enumerate(samples):
        bias[i, list(sample.bias_ids)] = sample.biases
        bias[i, list(sample.forbidden_ids)] = NEVER
        is_stop[i, list(sample.stop_ids)] = True
        is_dry_breaker[i, breaker_ids.get(sample.dry_breakers, [])] = True

    def column(name: str) -> np.ndarray:
        values = [getattr(sample, name) for sample in samples]
        largest = np.iinfo(np.int32).max
        if isinstance(values[0], float):
            return np.array(values, np.float32)
        return np.array([min(v, largest) for v in values], np.int32)

    of_rows = ("bias", "is_stop", "is_dry_breaker")
    names = [f for f in RowSettings.__dataclass_fields__ if f not in of_rows]
    columns = {name: column(name) for name in names}
    return RowSettings(
        **columns, bias=bias, is_stop=is_stop, is_dry_breaker=is_dry_breaker
    )


def _ids_with(texts: Sequence[str], token_bytes: Sequence[bytes]) -> list[int]:
    """Returns the ids whose bytes contain one of the texts."""
    parts = [text.encode() for text in texts]
    return [i for i, b in enumerate(token_bytes) if any(part in b for part in parts)]
