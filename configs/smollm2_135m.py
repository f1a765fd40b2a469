"""Pretrains the architecture of SmolLM2-135M, on a machine with an accelerator.

Command: python train.py configs/smollm2_135m.py --data.path FOLDER

Cost: 135M parameters. Two CPU cores reach 318 tokens/s at 4 x 256 tokens a step, enough
only to try it out.

Result: not measured. The recipe is a common one (AdamW, cosine), not a tuned one.
"""

import dataclasses

from jaxlm.config import Config, DataConfig, OptimizerConfig, TrainConfig
from jaxlm.model.presets import preset


def get_config() -> Config:
    # The vocabulary comes from a tokenizer trained on the text, not from SmolLM2.
    model = dataclasses.replace(preset("smollm2-135m"), vocab_size=0, remat="dots")
    return Config(
        model=model,
        data=DataConfig(
            tokenizer="sentencepiece",
            tokenizer_vocab_size=32_768,
            sequence_length=2048,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
        train=TrainConfig(
            steps=10_000,
            batch_size=64,
            loss_chunk=16_384,
            run_dir="runs/smollm2_135m",
        ),
    )
