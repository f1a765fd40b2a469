"""A character model of Shakespeare, trained on a laptop CPU in minutes.

python train.py
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
            unroll_layers=0,
        ),
        data=DataConfig(sequence_length=128),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=0.004,
            schedule="wsd",
            decay_fraction=0.55,
            final_fraction=0.0,
        ),
        train=TrainConfig(
            steps=1500,
            batch_size=16,
            run_dir="runs/shakespeare",
        ),
    )
