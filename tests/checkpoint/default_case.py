"""A small model of the kind that README's first command trains, with its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from parity_case import nested, weights

from jaxlm.checkpoint.save import save
from jaxlm.config import ModelConfig
from jaxlm.flags.config_file import read_config
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import CharTokenizer

TEXT = (
    'First Citizen:\nWe are  accounted poor citizens; naïve 漢字 😀 \\n "it\'s"\t{[]}'
)


def default_model(
    tokenizer: Tokenizer | None = None,
) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    """Returns a config, random parameters and a tokenizer: by default, of characters."""
    config = read_config([])[0].model
    tokenizer = CharTokenizer(TEXT) if tokenizer is None else tokenizer
    config = dataclasses.replace(
        config,
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        model_dim=32,
        head_dim=8,
        hidden_dim=40,
        context_length=128,
        dtype="float32",
    )
    assert config.embedding_scale not in (0.0, 1.0) and not config.tied_embeddings
    return config, jax.tree.map(jnp.asarray, nested(weights(config))), tokenizer


def run_of(folder: Path) -> Path:
    """Writes it as a run."""
    save(folder, *default_model())
    return folder
