"""Chooses the published family that can express a model: it must read back equal.

A table of embeddings that is not also the output head may be stored multiplied by a
number, so it takes over an `embedding_scale` that the family does not have.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

from jaxlm.config import EXECUTION_FIELDS, ModelConfig
from jaxlm.fields import diff

T = TypeVar("T")

# How a model was initialized and is executed: no published file stores this.
NOT_KEPT = (*EXECUTION_FIELDS, "init", "init_std")


def choose(
    config: ModelConfig,
    attempts: Mapping[str, Callable[[], tuple[T, ModelConfig]]],
    what: str,
) -> tuple[str, T, float]:
    """Returns the first family whose description of the model reads back as the model.

    The third value is the factor by which the file's table of embeddings is ours.

    Args:
      config: the model.
      attempts: for each family a function that returns its description of the model,
        and the config that a reader makes of this description.
      what: what a family is called in messages: "architecture of llama.cpp".

    Raises:
      ValueError: if there is none; names the differences from the nearest family.
    """
    folded = () if config.tied_embeddings else ("embedding_scale",)
    nearest: tuple[str, list[str]] | None = None
    reasons: list[str] = []
    for name, attempt in attempts.items():
        try:
            description, back = attempt()
        except ValueError as error:
            reasons.append(f"{name}: {error}")
            continue
        lines = diff(_explicit(config), _explicit(back), ignore=(*NOT_KEPT, *folded))
        if not lines:
            return name, description, config.embedding_scale / back.embedding_scale
        if nearest is None or len(lines) < len(nearest[1]):
            nearest = name, lines
    if nearest is None:
        raise ValueError(f"no {what} computes this model: {reasons[0]}")
    raise ValueError(
        f"no {what} computes this model; the nearest, {nearest[0]}, differs in "
        f"{'; '.join(nearest[1])}"
    )


def _explicit(config: ModelConfig) -> ModelConfig:
    """Spells out the defaults of a config, and resets numbers without effect."""
    scale = config.attention_scale
    scaling = config.rope_scaling
    if scaling is not None:
        length = scaling.original_context_length or config.context_length
        if scaling.kind == "linear":
            length = 0
        scaling = dataclasses.replace(scaling, original_context_length=length)
        if scaling.kind == "longrope":
            # LongRoPE's factor follows from the lengths.
            scaling = dataclasses.replace(scaling, factor=1.0)
    return dataclasses.replace(
        config,
        attention_scale=config.head_dim**-0.5 if scale is None else scale,
        rope_scaling=scaling,
    )
