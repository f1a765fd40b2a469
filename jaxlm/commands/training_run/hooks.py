"""What a training run does between its steps: evaluations, samples and saves."""

from collections.abc import Iterator
from functools import partial

import jax

from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.commands.training_run.looks import make_looks
from jaxlm.commands.training_run.sampler import make_sampler
from jaxlm.config import Config, TrainConfig
from jaxlm.data.loader import Dataset, place
from jaxlm.sharding import rules
from jaxlm.train.loop import Hooks
from jaxlm.train.state import TrainState
from jaxlm.types import Batch

# Share of the training time that evaluations may take by default.
EVAL_SHARE = 0.1


def make_hooks(
    config: Config, dataset: Dataset, checkpoints: CheckpointManager
) -> Hooks:
    """Makes the functions that the loop calls: evaluation, samples and saves."""
    size = (config.train.batch_size, config.data.sequence_length)
    numbers = eval_batch_numbers(config.train, dataset.num_eval_batches(size[0]))
    sharding = rules.batch_sharding(jax.sharding.get_mesh())
    tokenizer = dataset.tokenizer
    samples = config.train.sample_every > 0 and config.train.sample_tokens > 0

    def held_out() -> Iterator[Batch]:
        for number in numbers:
            yield place(partial(dataset.eval_batch, number, size[0]), size, sharding)

    def save(state: TrainState) -> None:
        checkpoints.save(
            int(state.step),
            state.params,
            state.opt_state,
            state.spikes,
            config=config,
            tokenizer=tokenizer,
            data_fingerprint=dataset.fingerprint,
        )

    return Hooks(
        save=save,
        held_out=held_out if numbers else None,
        # A few tokens may all end documents, and have no bytes.
        bytes_per_token=(dataset.eval_bytes_per_token or None) if numbers else None,
        sample=make_sampler(config, tokenizer) if samples else None,
        look=make_looks(config, tokenizer) if config.train.look_every else None,
    )


def eval_batch_numbers(settings: TrainConfig, total: int) -> list[int]:
    """Returns which of `total` batches of held-out text an evaluation takes, evenly.

    The default counts operations and measures no time, so a resumed run takes the same.
    A training step, forward and backward, has three times those of a batch here.
    """
    count = settings.eval_batches
    if count is None:
        steps = settings.eval_every or settings.steps
        count = max(int(EVAL_SHARE * 3 * steps), 1)
    count = min(count, total) if count else total
    return [number * total // count for number in range(count)]
