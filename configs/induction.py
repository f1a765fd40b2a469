"""A model of two layers in which induction heads appear, in a minute on two CPU cores.

Command: python train.py configs/induction.py

Cost: 0.1M parameters, 400 steps of 2,048 letters; about a minute on two CPU cores.

Result: docs/inside.md, "An induction head, from nothing", which also makes the text:
letters in random order, repeated. After some 100 steps the loss falls, and the score of
induction in the report rises to over 0.9.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        # The first layer sees two tokens, and the second has no positions, so it has to
        # go by content. Without these two hints the same takes many times the steps.
        model=ModelConfig(
            num_layers=2,
            model_dim=64,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            hidden_dim=128,
            context_length=64,
            layer_pattern=("local", "global"),
            window=2,
            rope_pattern=(True, False),
            tied_embeddings=False,
            embedding_scale=8.0,
            init="fan_in",
            unroll_layers=0,
            dtype="float32",
        ),
        data=DataConfig(path=("repeats.jsonl",), tokenizer="bytes", sequence_length=64),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.03,
            adam_learning_rate=0.006,
            warmup_steps=20,
            schedule="wsd",
            decay_fraction=0.3,
            final_fraction=0.0,
        ),
        train=TrainConfig(
            steps=400,
            batch_size=32,
            eval_every=100,
            sample_every=0,
            look_every=25,
            look_text="cwmfjordbankglyphsvextquiz",
            run_dir="runs/induction",
        ),
    )
