"""Pretrains the architecture of Llama 3 8B on one host of 8 H100.

Command: python train.py configs/llama_8b_h100_8.py --data.path FOLDER

Cost: 8.03B parameters; 65,536 tokens a step, 6.6B tokens in all. One process has all
eight cards; docs/launch.md has the commands for several hosts.

Result: not measured. It compiles for these cards and fits their memory.
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
        mesh=MeshConfig(data=1, fsdp=8),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        train=TrainConfig(
            steps=100_000,
            batch_size=8,
            loss_chunk=4096,
            eval_every=1000,
            sample_every=1000,
            checkpoint_every=1000,
            run_dir="runs/llama_8b_h100_8",
        ),
    )
