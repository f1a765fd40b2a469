"""Fine-tunes a published model, or an earlier run, on your own text.

Command: python train.py configs/finetune.py --init-from CHECKPOINT --data.path TEXT

Cost: SmolLM2-135M on two CPU cores takes about 3 s a step, 5 minutes in all.

Result: a model in the style of your text. Watch the held-out loss: it rises again when
the model starts to memorize the text.

The model and the tokenizer come from the checkpoint: a run, a Hugging Face folder, a
.gguf file or hf:owner/name. Afterwards `jaxlm convert runs/finetune DST` exports it.
"""

from jaxlm.config import (
    NEEDS_INIT_FROM,
    Config,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxlm.model.presets import preset


def get_config() -> Config:
    return Config(
        init_from=NEEDS_INIT_FROM,
        model=preset("smollm2-135m"),  # Replaced by the checkpoint's.
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=10),
        train=TrainConfig(
            steps=100,
            batch_size=4,
            eval_every=25,
            sample_every=50,
            checkpoint_every=50,
            run_dir="runs/finetune",
        ),
    )
