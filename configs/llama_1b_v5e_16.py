"""Pretrains the architecture of Llama 3.2 1B on a TPU v5e-16: 4 hosts of 4 chips.

Command, on every host: python train.py configs/llama_1b_v5e_16.py --data.path FOLDER

Cost: 1.24B parameters; 131,072 tokens a step, 13B tokens in all. docs/launch.md has the
commands of the hosts.

Result: not measured. It compiles for these chips and fits their memory.
"""

import dataclasses

from jaxlm.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.model.presets import preset


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(
            preset("llama3.2-1b"), context_length=4096, remat="full"
        ),
        # Its license must be accepted; or give another with --data.tokenizer.
        data=DataConfig(tokenizer="hf:meta-llama/Llama-3.2-1B", sequence_length=4096),
        mesh=MeshConfig(data=1, fsdp=16),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        train=TrainConfig(
            steps=100_000,
            batch_size=32,
            loss_chunk=4096,
            eval_every=1000,
            sample_every=1000,
            checkpoint_every=1000,
            run_dir="runs/llama_1b_v5e_16",
        ),
    )
