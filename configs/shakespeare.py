"""A character model of Shakespeare, trained in minutes on a laptop CPU.

Command: python train.py

Cost: 0.8M parameters, 4.9M characters; about 3 minutes on two CPU cores.

Result: see docs/shakespeare.md, which also tells how the recipe was found.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=4,
            model_dim=128,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            hidden_dim=344,
            context_length=512,
            qk_norm="head",
            tied_embeddings=False,
            embedding_scale=128**0.5,
            init="fan_in",
            # Unrolled, four layers still compile fast, and run a tenth faster.
            unroll_layers=0,
        ),
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=0.004,
            schedule="wsd",
            decay_fraction=0.55,
            final_fraction=0.0,
        ),
        train=TrainConfig(
            steps=2400,
            batch_size=8,
            run_dir="runs/shakespeare",
            sample_prompt="\n",
        ),
    )
