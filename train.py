"""Train a language model: python train.py [CONFIG_FILE] [--section.field value ...]"""

import os
import sys
import time

STARTED = time.monotonic()
ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
on_cpu = sys.platform == "linux" and not any(map(os.path.exists, ACCELERATORS))
if on_cpu and "GLIBC_TUNABLES" not in os.environ:
    # XLA:CPU allocates its buffers anew in each step. With these settings malloc keeps
    # the memory, in huge pages, instead of giving it back and faulting it in again: a
    # quarter of a small model's step. They must be there before Python starts.
    options = {"hugetlb": 1, "arena_max": 1, "mmap_max": 0}
    options |= {"trim_threshold": 2**31 - 1, "top_pad": 2**28}
    tunables = ":".join(f"glibc.malloc.{k}={v}" for k, v in options.items())
    os.environ["GLIBC_TUNABLES"] = tunables
    os.execv(sys.executable, sys.orig_argv)

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm import tree
from jaxlm.checkpoint.families import NOT_KEPT
from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native.saving import Checkpoints, NoUsableCheckpoint
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.cli import fail, read_config, use_compile_cache
from jaxlm.config import Config, diff, to_dict
from jaxlm.data.loader import Dataset, batches, open_dataset, place
from jaxlm.infer.generate import generate
from jaxlm.ops.linear import compute_dtype
from jaxlm.progress import ProgressLine
from jaxlm.report.page import write_report
from jaxlm.report.picture import draw_loss_png
from jaxlm.sharding import rules
from jaxlm.sharding.mesh import make_mesh
from jaxlm.train.loop import Hooks, fit
from jaxlm.train.metrics import MetricsWriter
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.state import TrainState, abstract_state, init_state, state_from
from jaxlm.train.stopping import (
    EXIT_NO_CHECKPOINT,
    EXIT_NOT_FINITE,
    NotFinite,
    StopRequest,
)
from jaxlm.types import Batch, Params

SAMPLE_STREAM = 1  # of random numbers; parameters use the seed itself
HERE = Path(__file__).parent


def main() -> int:
    config, initial = read_config(sys.argv[1:], HERE / "configs" / "shakespeare.py")
    if config.train.compile_cache:
        use_compile_cache()
    try:
        with jax.set_mesh(make_mesh(config.mesh)):
            return train(config, initial)
    except NoUsableCheckpoint as error:
        fail(error, EXIT_NO_CHECKPOINT)
    except NotFinite as error:
        fail(error, EXIT_NOT_FINITE)
    except ValueError as error:
        fail(error)


def train(config: Config, initial: Checkpoint | None) -> int:
    """Runs a config to its end or to a stop; returns the exit code.

    Args:
      initial: the checkpoint of `config.init_from`, opened.
    """
    settings = config.train
    run = Path(settings.run_dir)
    checkpoints = Checkpoints(
        run, settings.keep, settings.keep_every, fresh=config.fresh
    )
    with checkpoints, StopRequest(settings.max_minutes) as stop:
        dataset = open_data(config, initial)
        config = with_vocabulary(config, dataset.tokenizer.vocab_size)
        optimizer = make_optimizer(config.optimizer, settings.steps)
        state, resumed = start(config, optimizer, checkpoints, dataset, initial)
        step = int(state.step)
        if resumed and step >= settings.steps:
            print(f"{run}: all {step} steps are done; raise --train.steps or --fresh")
            return 0
        (run / "config.json").write_text(json.dumps(to_dict(config), indent=2))

        writer = MetricsWriter(
            run,
            resume_step=step if resumed else None,
            tensorboard=settings.tensorboard,
        )
        progress = ProgressLine(settings.steps)
        params = tree.count(state.params)
        event = "resume" if resumed else "start"
        writer.write("event", step, event=event, params=params)
        progress.note(
            f"{run}: {params:,} parameters, {dataset.num_train_tokens:,} tokens of "
            f"text, {settings.steps - step} steps on {jax.device_count()} "
            f"{jax.devices()[0].device_kind}, "
            f"{compute_dtype(config.model.dtype).name}"
        )
        rows = batches(
            dataset,
            settings.batch_size,
            step,
            rules.batch_sharding(jax.sharding.get_mesh()),
            config.data.prefetch,
        )
        hooks = make_hooks(config, dataset, checkpoints)
        try:
            _, code = fit(
                config,
                optimizer,
                state,
                rows,
                hooks,
                writer=writer,
                progress=progress,
                stop=stop,
                started=STARTED,
            )
        finally:
            progress.close()
            writer.close()
            report = write_report([run], run / "report.html")
            draw_loss_png(run, run / "loss.png")
    print(f"{report}\npython sample.py {run}")
    return code


def open_data(config: Config, initial: Checkpoint | None) -> Dataset:
    tokenizer = None if initial is None else initial.tokenizer()
    return open_dataset(config.data, tokenizer, seed=config.train.seed)


def with_vocabulary(config: Config, size: int) -> Config:
    """The config with the vocabulary size set, and checked against the tokenizer's."""
    model = config.model
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=size)
    elif model.vocab_size < size:
        raise ValueError(
            f"model.vocab_size is {model.vocab_size}, but the tokenizer has {size} "
            "tokens: raise it, or leave it at 0"
        )
    return dataclasses.replace(config, model=model)


def start(
    config: Config,
    optimizer,
    checkpoints: Checkpoints,
    dataset: Dataset,
    initial: Checkpoint | None,
) -> tuple[TrainState, bool]:
    """The state to train from, and whether it continues this run."""
    mesh = jax.sharding.get_mesh()
    wanted = abstract_state(config.model, optimizer, mesh)
    restored = checkpoints.restore_latest(
        wanted.params,
        wanted.opt_state,
        config=config,
        tokenizer_fingerprint=dataset.tokenizer.fingerprint,
        data_fingerprint=dataset.fingerprint,
    )
    if restored is not None:
        step = jax.device_put(restored.step, wanted.step.sharding)
        return TrainState(step, restored.params, restored.opt_state), True
    if initial is None:
        return init_state(config.model, optimizer, config.train.seed, mesh), False
    if lines := diff(initial.config, config.model, ignore=NOT_KEPT):
        raise ValueError(f"--init-from {config.init_from}: {'; '.join(lines)}")
    shardings = jax.tree.map(lambda x: x.sharding, wanted.params)
    _, params = load(initial, dtype=jnp.float32, shardings=shardings)
    return state_from(params, optimizer), False


def make_hooks(config: Config, dataset: Dataset, checkpoints: Checkpoints) -> Hooks:
    size = (config.train.batch_size, config.data.sequence_length)
    sharding = rules.batch_sharding(jax.sharding.get_mesh())
    tokenizer = dataset.tokenizer
    prompt = tokenizer.encode(config.train.sample_prompt)
    drawing = dataclasses.replace(
        config.sample, max_new_tokens=config.train.sample_tokens or 1
    )

    def held_out() -> list[Batch]:
        for number in range(dataset.num_eval_batches(size[0])):
            yield place(partial(dataset.eval_batch, number, size[0]), size, sharding)

    def sample(params: Params, step: int) -> str:
        key = jax.random.fold_in(jax.random.key(config.train.seed), SAMPLE_STREAM)
        result = generate(
            config.model,
            params,
            [prompt],
            drawing,
            jax.random.fold_in(key, step),
            num_tokens=tokenizer.vocab_size,
        )
        return tokenizer.decode(result.tokens[0, : result.lengths[0]])

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

    evaluates = dataset.num_eval_batches(size[0]) > 0
    return Hooks(
        save=save,
        held_out=held_out if evaluates else None,
        bytes_per_token=dataset.eval_bytes_per_token if evaluates else None,
        sample=sample if config.train.sample_tokens else None,
    )


if __name__ == "__main__":
    sys.exit(main())
