"""The looks inside its model that a training run takes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlm.config import Config
from jaxlm.interp.sentence_view import sentence_view
from jaxlm.sharding import rules
from jaxlm.sharding.processes import whole
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

# Tokens of the sentence, and of a row, which repeats them: any mesh divides it.
SENTENCE, ROW = 32, 64


def make_looks(
    config: Config, tokenizer: Tokenizer
) -> Callable[[Params], dict[str, Any]]:
    """Makes the function that returns the fields of a "look" row.

    Raises:
      ValueError: for a sentence that is empty, or that the tokenizer cannot encode, and
        on a mesh that cuts rows.
    """
    flag, off = "--train.look-text", "or turn looks off with --train.look-every 0"
    try:
        ids = tokenizer.encode_prompt(config.train.look_text)[:SENTENCE]
    except ValueError as error:
        raise ValueError(f"{flag}: {error}; {off}") from error
    if not len(ids):
        raise ValueError(f"{flag} is empty: give a sentence, {off}")
    if (parts := rules.context_parts()) > 1:
        raise ValueError(
            f"--train.look-every needs whole rows on a device, which --mesh.context "
            f"{parts} cuts: take a mesh without it, {off}"
        )
    row = np.resize(ids, min(ROW, config.model.context_length))
    tokens = jax.device_put(
        np.tile(row, (rules.batch_parts(), 1)),
        rules.batch_sharding(jax.sharding.get_mesh()),
    )
    run = jax.jit(partial(sentence_view, config.model), static_argnums=2)

    def look(params: Params) -> dict[str, Any]:
        seen = whole(run(params, tokens, len(ids)))
        return {
            "entropy": seen.entropy,
            "lens_depth": seen.lens_depth,
            "previous": seen.previous.max(),
            "induction": seen.induction.max(),
            "memory": None if seen.memory is None else seen.memory.sum(),
            "previous_heads": np.round(seen.previous.astype(float), 4).tolist(),
            "induction_heads": np.round(seen.induction.astype(float), 4).tolist(),
            "memory_layers": (
                None
                if seen.memory is None
                else np.round(seen.memory.astype(float), 4).tolist()
            ),
        }

    return look
