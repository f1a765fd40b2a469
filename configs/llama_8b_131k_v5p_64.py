"""Trains the architecture of Llama 3.1 8B on rows of 131,072 tokens, cut over 8 chips.

On a TPU v5p of 4x4x4 chips, 16 hosts; with `--data.path FOLDER` on every host:

python train.py configs/llama_8b_131k_v5p_64.py

Cost: 8.03B parameters; 1,048,576 tokens a step, 10.5B tokens. docs/launch.md has the
commands of the hosts.

Result: not measured. It compiles for these chips and fits their memory.
"""

import dataclasses

from jaxlm.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.model.presets import preset


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(
            preset("llama3.1-8b"), context_length=131_072, remat="full"
        ),
        # Its license must be accepted; or give another with --data.tokenizer.
        data=DataConfig(
            tokenizer="hf:meta-llama/Meta-Llama-3-8B", sequence_length=131_072
        ),
        mesh=MeshConfig(data=1, fsdp=8, context=8),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=500),
        train=TrainConfig(
            steps=10_000,
            batch_size=8,
            loss_chunk=4096,
            eval_every=1000,
            sample_every=1000,
            checkpoint_every=1000,
            run_dir="runs/llama_8b_131k_v5p_64",
        ),
    )
