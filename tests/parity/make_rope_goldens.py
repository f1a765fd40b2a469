"""Writes tests/model/rope_goldens.json: frequencies from transformers' functions.

    PYTHONPATH=.:tests/parity python tests/parity/make_rope_goldens.py

The stored file was made with transformers 5.23.0 (`ROPE_INIT_FUNCTIONS`).
"""

import dataclasses
import json
from pathlib import Path

from hf_case import rope_parameters
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxlm import config as config_module
from jaxlm.config import ModelConfig, RopeScaling

OUT = Path(__file__).parents[1] / "model" / "rope_goldens.json"
SHORT = tuple(1.0 + i / 10 for i in range(16))
LONG = tuple(1.5 + i * i / 4 for i in range(16))
# name -> (scaling, fraction of the head that is rotated, length of the row)
CASES = {
    "linear": (dict(kind="linear", factor=8.0), 1.0, 10),
    "linear, partial": (dict(kind="linear", factor=8.0), 0.5, 10),
    "llama3": (dict(kind="llama3", factor=8.0, original_context_length=64), 1.0, 10),
    "llama3, other borders": (
        dict(
            kind="llama3",
            factor=32.0,
            original_context_length=64,
            low_frequency_factor=0.5,
            high_frequency_factor=6.0,
        ),
        0.5,
        10,
    ),
    "yarn": (dict(kind="yarn", factor=4.0, original_context_length=64), 1.0, 10),
    "yarn, whole dimensions off": (
        dict(
            kind="yarn",
            factor=32.0,
            original_context_length=4096,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
        ),
        1.0,
        10,
    ),
    "yarn, other betas": (
        dict(
            kind="yarn",
            factor=4.0,
            original_context_length=512,
            beta_fast=16.0,
            beta_slow=2.0,
        ),
        0.5,
        10,
    ),
    "dynamic, short": (
        dict(kind="dynamic", factor=4.0, original_context_length=64),
        1.0,
        50,
    ),
    "dynamic, long": (
        dict(kind="dynamic", factor=4.0, original_context_length=64),
        1.0,
        200,
    ),
    "dynamic, partial": (
        dict(kind="dynamic", factor=4.0, original_context_length=64),
        0.5,
        100,
    ),
    "longrope, short": (
        dict(kind="longrope", short_factors=SHORT, long_factors=LONG),
        1.0,
        64,
    ),
    "longrope, long": (
        dict(kind="longrope", short_factors=SHORT, long_factors=LONG),
        1.0,
        65,
    ),
    "longrope, partial": (
        dict(kind="longrope", short_factors=SHORT[:8], long_factors=LONG[:8]),
        0.5,
        65,
    ),
}


def main():
    goldens = {}
    for name, (scaling, fraction, length) in CASES.items():
        scaling = RopeScaling(**{"original_context_length": 64, **scaling})
        c = ModelConfig(
            num_layers=1,
            model_dim=32,
            num_heads=1,
            num_kv_heads=1,
            head_dim=32,
            hidden_dim=8,
            context_length=256,
            rope_theta=5e4,
            rope_fraction=fraction,
            rope_scaling=scaling,
        )
        # Dynamic scaling takes its original length from the context length.
        dynamic = scaling.kind == "dynamic"
        hf = LlamaConfig(
            hidden_size=32,
            num_attention_heads=1,
            head_dim=32,
            max_position_embeddings=64 if dynamic else 256,
            rope_parameters=rope_parameters(c),
        )
        function = ROPE_INIT_FUNCTIONS[scaling.kind]
        frequency, factor = function(hf, "cpu", seq_len=length)
        goldens[name] = {
            "config": config_module.to_dict(
                dataclasses.replace(c, rope_scaling=scaling)
            ),
            "length": length,
            "frequency": frequency.double().tolist(),
            "attention_factor": float(factor),
        }
    OUT.write_text(json.dumps(goldens))
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
