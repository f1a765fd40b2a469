"""Makes run folders without training."""

import json

from jaxlm.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxlm.fields import to_dict
from jaxlm.train.metrics import MetricsWriter


def make_run(
    folder, losses, *, evals=(), samples=(), log_every=10, config=True, **more
):
    """Makes a run folder whose training rows have `losses`."""
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        model = ModelConfig(
            vocab_size=65,
            num_layers=2,
            model_dim=32,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            hidden_dim=64,
            context_length=256,
        )
        optimizer = OptimizerConfig(learning_rate=more.pop("lr", 1e-3), warmup_steps=0)
        train = TrainConfig(steps=2000)
        config = to_dict(Config(model=model, optimizer=optimizer, train=train))
        (folder / "config.json").write_text(json.dumps(config))
    with MetricsWriter(folder) as writer:
        for i, loss in enumerate(losses, start=1):
            step = i * log_every
            writer.write(
                "train",
                step,
                loss=loss,
                lr=1e-3,
                grad_norm=0.5,
                tokens_per_s=1000.0,
                mfu=0.25,
                data_wait_s=0.01,
                step_s=0.1,
                tokens=step * 256,
                wall_s=step * 0.1,
            )
        for step, loss in evals:
            writer.write("eval", step, loss=loss, bits_per_byte=loss / 2, targets=9)
        for step, text in samples:
            writer.write("sample", step, text=text, prompt="> ")
    return folder
