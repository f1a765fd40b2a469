"""Pretrains the architecture of Llama 3 8B on a TPU v5p of 4x4x4 chips, 16 hosts.

Command, on every host: python train.py configs/llama_8b_v5p_64.py --data.path FOLDER

Cost: 8.03B parameters; 524,288 tokens a step, 105B tokens. docs/launch.md has the
commands of the hosts.

Result: not measured. It compiles for these chips and fits their memory.
"""

import dataclasses

from jaxlm.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.model.presets import preset


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(
            preset("llama3-8b"), context_length=8192, remat="full"
        ),
        # Its license must be accepted; or give another with --data.tokenizer.
        data=DataConfig(
            tokenizer="hf:meta-llama/Meta-Llama-3-8B", sequence_length=8192
        ),
        mesh=MeshConfig(data=1, fsdp=64),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        train=TrainConfig(
            steps=200_000,
            batch_size=64,
            loss_chunk=4096,
            eval_every=1000,
            sample_every=1000,
            checkpoint_every=1000,
            run_dir="runs/llama_8b_v5p_64",
        ),
    )
