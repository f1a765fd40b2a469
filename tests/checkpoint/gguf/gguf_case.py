"""Toy models for which llama.cpp has an architecture."""

import dataclasses

from jaxlm.config import ModelConfig
from jaxlm.model.presets import preset, toy

# One for each architecture, and one for each RoPE scaling.
NAMES = (
    "smollm2-135m",
    "llama3.2-1b",
    "qwen2-0.5b",
    "qwen3-0.6b",
    "gemma-2b",
    "gemma2-2b",
    "gemma3-4b",
    "phi3-mini-128k",
    "phi4-mini",
    "mixtral-8x7b",
    "qwen3-30b-a3b",
)


def small(name: str) -> ModelConfig:
    """Makes a toy; if llama.cpp requires it, with heads that add up to the width."""
    config = toy(preset(name))
    if name.startswith(("qwen2", "phi")):
        width = config.num_heads * config.head_dim
        config = dataclasses.replace(config, model_dim=width)
    return config
