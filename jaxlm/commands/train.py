"""Train a language model: from a config to a run folder.

`train` runs everything: it reads the text, makes or restores the state, runs the loop
and writes the run folder. It wires together parts of jaxlm that are independent of
each other.
"""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import tree
from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.step_folder import NoUsableCheckpoint
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.generation import check_room, with_stop_ids
from jaxlm.commands.process import STARTED, fail, use_compile_cache
from jaxlm.config import Config, TrainConfig
from jaxlm.data.loader import Dataset, batches, open_dataset, place
from jaxlm.fields import diff, to_dict
from jaxlm.files.durable import replacing
from jaxlm.infer.check_arguments import check_samples
from jaxlm.infer.generate import generate
from jaxlm.infer.rules.stop_strings import until_stop
from jaxlm.model.attention_choice import attention_choices
from jaxlm.ops.linear import compute_dtype
from jaxlm.plan.memory import available_memory, check_fits
from jaxlm.report.live import REPORT, LiveReport
from jaxlm.sharding import rules
from jaxlm.sharding.mesh import make_mesh
from jaxlm.terminal.exit_codes import (
    EXIT_DONE,
    EXIT_NO_CHECKPOINT,
    EXIT_NOT_FINITE,
)
from jaxlm.terminal.interrupts import Interrupts
from jaxlm.terminal.progress import ProgressLine, Waiting
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.bytes_and_characters import CharTokenizer
from jaxlm.train.loop import Hooks, due_kinds, fit
from jaxlm.train.metrics import MetricsWriter, kinds_at
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.sinks import open_sinks
from jaxlm.train.state import TrainState, abstract_state, init_state, state_from
from jaxlm.train.stopping import (
    SIGNAL_CODES,
    NotFinite,
    StopRequest,
)
from jaxlm.types import Batch, Params

# Folded into the seed for the keys of samples; the parameters use the seed itself.
SAMPLE_STREAM = 1
# Share of the training time that evaluations may take by default.
EVAL_SHARE = 0.1

logger = logging.getLogger(__name__)


def main(
    config: Config,
    initial: Checkpoint | None,
    *,
    sample_command: str = "jaxlm sample",
) -> int:
    """Calls `train` on the devices of the config's mesh; returns the exit code."""
    if config.train.compile_cache:
        use_compile_cache()
    try:
        with jax.set_mesh(make_mesh(config.mesh)):
            return train(config, initial, sample_command)
    except NoUsableCheckpoint as error:
        fail(error, EXIT_NO_CHECKPOINT)
    except NotFinite as error:
        fail(error, EXIT_NOT_FINITE)


def train(
    config: Config,
    initial: Checkpoint | None = None,
    sample_command: str = "jaxlm sample",
) -> int:
    """Trains until the last step or until a stop is requested, on the current mesh.

    Args:
      config: the whole run.
      initial: the checkpoint whose parameters training starts from; None initializes
        them.
      sample_command: the command printed at the end for sampling from the run.

    Returns:
      The exit code (`terminal/exit_codes.py`).

    Raises:
      ValueError: if the text, the run folder, the checkpoint or the prompt of the
        samples cannot be used.
      NotFinite: at the first step whose loss or gradient is not finite.
    """
    given, config = config, with_fitting_warmup(config)
    settings = config.train
    checkpoints = CheckpointManager(
        settings.run_dir, settings.keep, settings.keep_every, fresh=config.fresh
    )
    stop = StopRequest(settings.max_minutes)
    # Until the first step there is nothing to save, so a signal ends the run.
    with checkpoints, Interrupts(SIGNAL_CODES):
        # Read the text.
        tokenizer = None if initial is None else initial.tokenizer()
        with Waiting("reading the text", in_logs=False):
            dataset = open_dataset(config.data, tokenizer, seed=settings.seed)
        config = with_vocabulary(config, dataset.tokenizer.vocab_size)
        config = with_prompt(config, dataset.tokenizer)
        hooks = make_hooks(config, dataset, checkpoints)

        # Make or restore the state.
        optimizer = make_optimizer(config.optimizer, settings.steps)
        state, resumed = initial_state(config, optimizer, checkpoints, dataset, initial)
        step = int(state.step)
        # What a stop during the evaluation of this step has left out.
        due = due_kinds(settings, hooks, step) if resumed else set()
        missing = due - kinds_at(settings.run_dir, step)
        if resumed and step >= settings.steps and not missing:
            print(how_to_go_on(given, config))
            return EXIT_DONE
        warmup = config.optimizer.warmup_steps
        if not resumed and warmup < given.optimizer.warmup_steps:
            print(
                f"warm-up of {warmup} step{'s' * (warmup > 1)}, a tenth of the run, "
                f"instead of {given.optimizer.warmup_steps}",
                file=sys.stderr,
            )

        total = dataset.num_eval_batches(settings.batch_size)
        taken = len(eval_batch_numbers(settings, total))
        if not resumed and settings.eval_batches is None and taken < total:
            print(
                f"evaluations take {taken} of the {total} batches of held-out text, at "
                "most a tenth of the training time; --train.eval-batches 0 takes all",
                file=sys.stderr,
            )

        # Train.
        sharding = rules.batch_sharding(jax.sharding.get_mesh())
        rows = batches(
            dataset, settings.batch_size, step, sharding, config.data.prefetch
        )
        with run_outputs(config, state, resumed, dataset) as (writer, progress), stop:
            state, code = fit(
                config,
                optimizer,
                state,
                rows,
                hooks,
                writer=writer,
                progress=progress,
                stop=stop,
                missing=missing,
                started=STARTED,
            )
            with Waiting("saving", in_logs=False):
                checkpoints.wait()
    step, again = int(state.step), "; the same command continues" if code else ""
    print(f"saved at step {step}{again}", file=sys.stderr)
    print(f"{settings.run_dir}/{REPORT}\n{sample_command} {settings.run_dir}")
    return code


def with_fitting_warmup(config: Config) -> Config:
    """Shortens a warm-up of more than half of the run to a tenth of it."""
    steps, optimizer = config.train.steps, config.optimizer
    if 2 * optimizer.warmup_steps <= steps:
        return config
    optimizer = dataclasses.replace(optimizer, warmup_steps=max(steps // 10, 1))
    return dataclasses.replace(config, optimizer=optimizer)


def how_to_go_on(given: Config, config: Config) -> str:
    """Returns what can be done with a run whose steps are all done.

    Args:
      given: the config before `with_fitting_warmup`.
      config: the config of the run.
    """
    run, steps, optimizer = config.train.run_dir, config.train.steps, config.optimizer
    done = f"{run}: all {steps} steps are done"
    if optimizer.first_decayed(steps) is None:
        more = f"to train on: --train.steps {2 * steps}"
        if optimizer.warmup_steps < given.optimizer.warmup_steps:
            more += f" --optimizer.warmup-steps {optimizer.warmup_steps}"
    else:
        done += f", and the learning rate has decayed ({optimizer.schedule})"
        more = f"to train its weights further: --init-from {run} --train.run-dir NEW"
    return f"{done}\n{more}\nto start over: --fresh"


def with_vocabulary(config: Config, size: int) -> Config:
    """Sets `model.vocab_size` if it is 0, else checks that it holds all tokens."""
    model = config.model
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=size)
    elif model.vocab_size < size:
        raise ValueError(
            f"model.vocab_size is {model.vocab_size}, but the tokenizer has {size} "
            "tokens: raise it, or leave it at 0"
        )
    return dataclasses.replace(config, model=model)


def initial_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    checkpoints: CheckpointManager,
    dataset: Dataset,
    initial: Checkpoint | None,
) -> tuple[TrainState, bool]:
    """Returns the state to train from, and whether it continues this run."""
    mesh = jax.sharding.get_mesh()
    wanted = abstract_state(config.model, optimizer, mesh)
    check_fits(config, wanted.params, wanted.opt_state, available_memory())
    with Waiting("reading the checkpoint"):
        restored = checkpoints.restore(
            wanted.params,
            wanted.opt_state,
            config=config,
            tokenizer_fingerprint=dataset.tokenizer.fingerprint,
            data_fingerprint=dataset.fingerprint,
        )
    if restored is not None:
        # A Python integer has a weak type, for which the step would compile again.
        step = jax.device_put(np.int32(restored.step), wanted.step.sharding)
        return TrainState(step, restored.params, restored.opt_state), True
    if initial is None:
        with Waiting("initializing the parameters"):
            state = init_state(config.model, optimizer, config.train.seed, mesh)
            return jax.block_until_ready(state), False
    if lines := diff(initial.config, config.model, ignore=NOT_KEPT):
        changes = "; ".join(f"model.{line}" for line in lines)
        raise ValueError(
            f"the model of --init-from {config.init_from} is another one ({changes}): "
            "leave out the --model flags that change it"
        )
    shardings = jax.tree.map(lambda x: x.sharding, wanted.params)
    with Waiting(f"loading the weights of {config.init_from}"):
        _, params = load(initial, dtype=jnp.float32, shardings=shardings)
        return jax.block_until_ready(state_from(params, optimizer)), False


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
            config=config,
            tokenizer=tokenizer,
            data_fingerprint=dataset.fingerprint,
            finite=True,
        )

    return Hooks(
        save=save,
        held_out=held_out if numbers else None,
        bytes_per_token=dataset.eval_bytes_per_token if numbers else None,
        sample=make_sampler(config, tokenizer) if samples else None,
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


def with_prompt(config: Config, tokenizer: Tokenizer) -> Config:
    """Replaces the default prompt, a line end, for characters of a text without one."""
    default, prompt = TrainConfig.sample_prompt, config.train.sample_prompt
    if prompt != default or not isinstance(tokenizer, CharTokenizer):
        return config
    if default in tokenizer.characters:
        return config
    train = dataclasses.replace(config.train, sample_prompt=tokenizer.characters[0])
    return dataclasses.replace(config, train=train)


def make_sampler(
    config: Config, tokenizer: Tokenizer
) -> Callable[[Params, int, Callable[[], bool]], str]:
    """Makes the function that generates a sample from the parameters at a step.

    It generates `train.sample_tokens` tokens, or fewer where the context ends or where
    the function that it is given returns True.

    Raises:
      ValueError: for an empty prompt, one that fills the context, and a stop id outside
        the vocabulary. `generate` would raise it too, but only in the middle of a run.
    """
    settings, model, flag = config.train, config.model, "--train.sample-prompt"
    off = "or turn samples off with --train.sample-every 0"
    try:
        prompt = tokenizer.encode_prompt(settings.sample_prompt)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}; {off}") from error
    if not len(prompt):
        raise ValueError(f"{flag} is empty: give at least one token, {off}")
    check_room(prompt, model, flag)
    room = model.context_length - len(prompt)
    sample_config = dataclasses.replace(
        config.sample, max_new_tokens=min(settings.sample_tokens, room)
    )
    sample_config = with_stop_ids(sample_config, tokenizer)
    key = jax.random.fold_in(jax.random.key(settings.seed), SAMPLE_STREAM)
    check_samples(model, [sample_config], tokenizer.vocab_size, tokenizer.token_bytes)

    def sample(params: Params, step: int, is_over: Callable[[], bool]) -> str:
        result = generate(
            model,
            params,
            [prompt],
            sample_config,
            jax.random.fold_in(key, step),
            num_tokens=tokenizer.vocab_size,
            token_bytes=tokenizer.token_bytes,
            on_tokens=lambda *_: is_over(),
        )
        text = tokenizer.decode(result.rows[0])
        return until_stop(text, sample_config.stop_strings)

    return sample


@contextlib.contextmanager
def run_outputs(
    config: Config, state: TrainState, resumed: bool, dataset: Dataset
) -> Iterator[tuple[MetricsWriter, ProgressLine]]:
    """Writes the config, the metrics and the report of a run, and shows its progress.

    The report is written during the run, and at the end, however the run ends.
    """
    settings, run = config.train, Path(config.train.run_dir)
    step, params = int(state.step), tree.count(state.params)
    choices = attention_choices(
        config.model, settings.batch_size, config.data.sequence_length
    )
    resume_step = step if resumed else None
    sinks = open_sinks(settings.log_to, run, to_dict(config), resume_step)
    try:
        with replacing(run / "config.json") as file:
            file.write(json.dumps(to_dict(config), indent=2).encode())
    except OSError as error:  # Only reports read it.
        logger.warning("%s: %s", error.filename, error.strerror)
    writer = MetricsWriter(
        run, resume_step=resume_step, sinks=[LiveReport(run), *sinks]
    )
    progress = ProgressLine(settings.steps)
    begun = f"resumed at step {step} of" if resumed else "training for"
    weights = ""
    if config.init_from is not None and not resumed:
        weights = f" from the weights of {config.init_from}"
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    kind = "CPU" if kind == "cpu" else kind
    devices = f"{count} {kind} device{'s' * (count > 1)}"
    dtype = compute_dtype(config.model.dtype).name
    progress.note(
        f"{run}: {params:,} parameters, {dataset.num_train_tokens:,} tokens of text\n"
        f"{begun} {settings.steps} steps{weights}, on {devices} in {dtype}\n"
        f"follow it in a browser: {run / REPORT}"
    )
    with writer, contextlib.closing(progress):
        writer.write(
            "event",
            step,
            event="resume" if resumed else "start",
            params=params,
            attention={kind: choice.to_json() for kind, choice in choices.items()},
        )
        yield writer, progress
