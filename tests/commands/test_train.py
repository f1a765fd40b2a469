"""What a person meets who trains: on the terminal, and before the first step."""

import dataclasses
import re
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import pytest
from terminal_case import CTRL_C, Terminal
from toy_case import make_params, toy

from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.checkpoint.native import compatible
from jaxlm.commands import train as train_module
from jaxlm.commands.train import _check_same_run, train
from jaxlm.commands.training_run import sampler
from jaxlm.commands.training_run.completed_config import (
    with_fitting_warmup,
    with_prompt,
)
from jaxlm.commands.training_run.hooks import eval_batch_numbers
from jaxlm.commands.training_run.sampler import make_sampler
from jaxlm.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    ProfileConfig,
    SampleConfig,
    TrainConfig,
)
from jaxlm.sharding.mesh import make_mesh
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer, CharTokenizer
from jaxlm.train.metrics import FIELDS, read_metrics

REPOSITORY = Path(__file__).parents[2]

TOKENIZER = ByteTokenizer()
MODEL = toy(vocab_size=TOKENIZER.vocab_size, context_length=40)


def make_data(folder):
    """Writes a small text, and returns the config that reads it."""
    text = folder / "text.txt"
    text.write_text("some words to train on\n" * 50)
    return DataConfig(
        path=(str(text),),
        cache_dir=str(folder / "cache"),
        tokenizer="bytes",
        sequence_length=16,
    )


@pytest.mark.parametrize(
    "sample, settings, message",
    [
        ({}, {"sample_prompt": ""}, r"^--train\.sample-prompt is empty: give"),
        (
            {},
            {"sample_prompt": "x" * 40},
            r"^--train\.sample-prompt has 40 tokens, .* context of 40; shorten the prompt$",
        ),
        ({"stop_ids": (999,)}, {}, r"^sample\.stop_ids: 999 is not in the vocab"),
    ],
)
def test_a_run_that_cannot_sample_is_refused_before_its_first_step(
    tmp_path, sample, settings, message
):
    data, run = make_data(tmp_path), tmp_path / "run"
    config = Config(
        model=MODEL,
        data=data,
        sample=SampleConfig(**sample),
        train=TrainConfig(steps=200, batch_size=2, run_dir=str(run), **settings),
    )
    with jax.set_mesh(make_mesh(config.mesh)), pytest.raises(ValueError, match=message):
        train(config)
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("during", ["_read_text", "initial_state"])
def test_a_run_that_takes_the_name_of_one_that_starts_is_left_alone(
    tmp_path, monkeypatch, during
):
    """While that reads its text or its state, which may take hours."""
    data, run = make_data(tmp_path), tmp_path / "run"
    settings = TrainConfig(steps=2, batch_size=2, run_dir=str(run), sample_every=0)
    config = Config(model=MODEL, data=data, train=settings)
    real = getattr(train_module, during)
    names = (".lock", "config.json", "metrics.jsonl", "texts.json")

    def replaced(*arguments):
        result = real(*arguments)
        run.rename(tmp_path / "moved")
        (run / "checkpoints").mkdir(parents=True)
        for name in names:
            (run / name).write_text(f"the {name} of another run\n")
        return result

    monkeypatch.setattr(train_module, during, replaced)
    with (
        jax.set_mesh(make_mesh(config.mesh)),
        pytest.raises(ValueError, match="run was moved, deleted or replaced since"),
    ):
        train(config)
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [*names, "checkpoints"]
    )
    for name in names:
        assert (run / name).read_text() == f"the {name} of another run\n"


def test_steps_and_rows_stay_together_when_a_folder_above_is_renamed(
    tmp_path, monkeypatch
):
    """With a run folder that is relative, as that of the configs is."""
    data, above = make_data(tmp_path), tmp_path / "above"
    above.mkdir()
    monkeypatch.chdir(above)
    settings = TrainConfig(
        **{"steps": 4, "batch_size": 2, "run_dir": "run", "sample_every": 0},
        **{"log_every": 1, "checkpoint_every": 1, "eval_every": 9},
    )
    config = Config(
        model=MODEL,
        data=data,
        optimizer=OptimizerConfig(warmup_steps=0),
        train=settings,
    )
    real = train_module.batches

    def batches(*arguments):
        for number, batch in enumerate(real(*arguments), 1):
            if number == 3:
                above.rename(tmp_path / "renamed")
            yield batch

    monkeypatch.setattr(train_module, "batches", batches)
    with jax.set_mesh(make_mesh(config.mesh)):
        assert train(config) == 0
    run = above / "run"
    assert "4" in {step.name for step in (run / "checkpoints").iterdir()}
    assert read_metrics(run)[-1]["step"] == 4
    assert (run / "config.json").is_file() and (run / "texts.json").is_file()


@pytest.mark.slow
def test_a_sample_ends_with_the_context():
    settings = TrainConfig(sample_prompt="x" * 30, sample_tokens=200)
    config = Config(model=MODEL, data=DataConfig(sequence_length=16), train=settings)
    sample = make_sampler(config, TOKENIZER)
    text = sample(make_params(MODEL), 1, lambda: False)
    assert 0 < len(text) <= 10


@pytest.mark.slow
def test_samples_begin_and_end_as_those_of_jaxlm_sample():
    """After a bos token, for a model that expects one, until the tokenizer's stop."""
    tokenizer = ByteTokenizer()
    tokenizer.bos_id, tokenizer.adds_bos, tokenizer.stop_ids = 256, True, (5, 6)
    settings = TrainConfig(sample_prompt="ab", sample_tokens=20)
    config = Config(model=MODEL, data=DataConfig(sequence_length=16), train=settings)
    sample = make_sampler(config, tokenizer)
    with mock.patch.object(
        sampler, "generate", side_effect=sampler.generate
    ) as generate:
        sample(make_params(MODEL), 1, lambda: False)
    _, _, (prompt,), sample_config, _ = generate.call_args.args
    assert list(prompt) == [256, 97, 98]
    assert sample_config.stop_ids == (5, 6)
    assert tokenizer.encode_prompt("").tolist() == [256]


@pytest.mark.slow
def test_a_report_that_cannot_be_written_costs_one_line(tmp_path, caplog):
    data, run = make_data(tmp_path), tmp_path / "run"
    (run / "report.html").mkdir(parents=True)
    # As a run that was killed before its first row has left it.
    (run / "config.json").write_text('{"model": {}, "data": {}, "train": {}}')
    config = Config(
        model=MODEL,
        data=data,
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(
            steps=2,
            batch_size=2,
            eval_every=1,
            sample_every=0,
            run_dir=str(run),
            log_to=("tensorboard",),
        ),
    )
    with jax.set_mesh(make_mesh(config.mesh)):
        assert train(config) == 0
    (line,) = caplog.messages
    assert "the report cannot be written" in line and "report.html" in line
    assert (run / "loss.png").is_file()
    assert any((run / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_resumed_run_takes_the_program_of_a_new_one(tmp_path, capsys):
    """A state of other types, if only weak ones, would be compiled for again."""
    data, states = make_data(tmp_path), []

    def fit_and_record(config, optimizer, state, *arguments, **more):
        states.append(jax.tree.map(jax.typeof, state))
        return fit(config, optimizer, state, *arguments, **more)

    fit = train_module.fit
    for steps in (1, 2):
        config = Config(
            model=MODEL,
            data=data,
            optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
            train=TrainConfig(
                steps=steps,
                batch_size=2,
                sample_every=0,
                run_dir=str(tmp_path / "run"),
            ),
        )
        with (
            jax.set_mesh(make_mesh(config.mesh)),
            mock.patch.object(train_module, "fit", fit_and_record),
        ):
            assert train(config) == 0
    new, resumed = states
    assert new == resumed
    assert re.search(
        r"training for 1 steps, on \d+ CPU devices? in ", capsys.readouterr().err
    )


def count_steps(last, dies=False):
    """Returns a `fit` that counts to a step, writes its rows and saves each fourth."""

    def fit(config, optimizer, state, batches, hooks, *, writer, **options):
        for step in range(int(state.step) + 1, last + 1):
            state = dataclasses.replace(state, step=jax.numpy.int32(step))
            row = dict.fromkeys(FIELDS["train"], 0.0)
            writer.write("train", step, **row)
            if dies:
                raise MemoryError
            if step % 4 == 0:
                hooks.save(state)
        return state, 0

    return fit


@pytest.mark.slow
def test_rows_and_steps_of_a_run_folder_that_is_not_whole(tmp_path, capsys, caplog):
    run = tmp_path / "run"
    config = Config(
        model=MODEL,
        data=make_data(tmp_path),
        optimizer=OptimizerConfig(warmup_steps=0),
        train=TrainConfig(steps=99, log_every=1, run_dir=str(run)),
    )

    def rows_of(run):
        return [row["step"] for row in read_metrics(run) if row["kind"] == "train"]

    def start(last, config=config, initial=None, **options):
        with (
            jax.set_mesh(make_mesh(config.mesh)),
            mock.patch.object(train_module, "fit", count_steps(last, **options)),
        ):
            train(config, initial)
        return capsys.readouterr().err

    late = dataclasses.replace(config, profile=ProfileConfig(steps="100:200"))
    err = start(8, late)
    assert "no rows" not in err
    assert "no step of --profile.steps 100:200 is to come" in err
    # The newest step cannot be read at one start, which dies before it has saved.
    away = run / "checkpoints/8/meta.json"
    content = away.read_bytes()
    away.unlink()
    with pytest.raises(MemoryError):
        start(9, dies=True)
    moved = f"moved steps 8 to {run / 'old-1'}: the run continues from 4"
    assert moved in capsys.readouterr().err
    assert rows_of(run) == [1, 2, 3, 4, 5]
    (run / "old-1/checkpoints/8/meta.json").write_bytes(content)
    assert rows_of(run / "old-1") == [*range(1, 9)] and load(run / "old-1")
    # Other weights are named, but the run has its own.
    initial = open_checkpoint(run / "old-1")
    other = dataclasses.replace(config, init_from=str(run / "old-1"))
    words = f"resumed at step 4 of 99 steps, not from the weights of {run / 'old-1'}"
    assert words in start(8, other, initial)
    # Somebody has restored an older log.
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if b'"step": 6' in line)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[: last + 1]))
    assert f"{run}/metrics.jsonl has no rows of steps 7 to 8" in start(9)
    resumes = [row for row in read_metrics(run) if row.get("event") == "resume"]
    assert resumes[-1]["missing_rows"] == [7, 8]
    start(12)
    assert "no rows" not in start(13)
    # A disk with the steps is not mounted.
    assert not caplog.messages
    (run / "checkpoints").rename(tmp_path / "disk")
    start(1)
    assert "without a checkpoint: training begins at step 0" in caplog.messages[0]
    assert caplog.messages[0].endswith("is now metrics.previous.jsonl")
    # Somebody has kept all but the steps of a run, and trains another one there.
    (run / "report.html").write_text("a record")
    (run / "loss.png").write_text("another")
    names = ("metrics.jsonl", "report.html", "loss.png", "texts.json", "config.json")
    kept = {name: (run / name).read_bytes() for name in names}
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7))
    words = f"moved the earlier run in {run} to {run / 'old-2'}: it has other flags or "
    assert words in start(1, other)
    assert {name: (run / "old-2" / name).read_bytes() for name in names} == kept
    # It was killed before its first save, and begins again.
    late = dataclasses.replace(other, fresh=False, profile=ProfileConfig(steps="1:2"))
    assert "moved" not in start(1, late) and not (run / "old-3").exists()
    (tmp_path / "text.txt").write_text("other words to train on\n" * 50)
    assert f"to {run / 'old-3'}: it has other flags or text" in start(1, late)


@pytest.mark.parametrize(
    "steps, warmup, fitting",
    [(200, 100, 100), (199, 100, 19), (50, 100, 5), (9, 10, 1), (1, 1, 1), (1, 0, 0)],
)
def test_a_warm_up_fits_a_short_run(steps, warmup, fitting):
    config = Config(
        model=MODEL,
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(warmup_steps=warmup),
        train=TrainConfig(steps=steps),
    )
    fitted = with_fitting_warmup(config)
    assert fitted.optimizer.warmup_steps == fitting
    assert with_fitting_warmup(fitted) == fitted


FLAGS = (
    *("--data.path", "text.txt", "--data.sequence-length", "32", "--data.workers=1"),
    *("--data.cache-dir", "cache", "--model.num-layers", "2", "--train.steps", "12"),
    *("--model.model-dim", "32", "--model.hidden-dim", "48", "--train.eval-every", "4"),
    *("--train.sample-every", "4", "--train.sample-tokens", "90", "--train.run-dir"),
)


# Runs `jaxlm train`. Before the first step it computes, as XLA does while it compiles,
# until the file "go" is there; with many rounds in one call for minutes.
HELD = """
import hashlib, pathlib, sys
from jaxlm import cli
from jaxlm.train import loop

def make_train_step(*arguments):
    step = made(*arguments)

    def held(state, batch):
        while not pathlib.Path("go").exists():
            hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))
        return step(state, batch)

    return held

made, loop.make_train_step = loop.make_train_step, make_train_step
sys.exit(cli.run("train", sys.argv[2:], "jaxlm train"))
"""


def start(folder, run, rounds=100_000):
    (folder / "text.txt").write_text("some words to train on\n" * 100)
    program = [sys.executable, "-c", HELD, str(rounds), *FLAGS, run]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    return Terminal(program, cwd=folder, environment=environment)


@pytest.mark.slow
def test_a_run_on_a_terminal_stopped_continued_and_started_once_more(tmp_path):
    with start(tmp_path, "runs/a b") as terminal:
        terminal.wait_for(r"(?m)^compiling the training step \.\.\. \d+ s")
        terminal.send(CTRL_C)
        terminal.wait_for("(?m)^stopping after this step and saving; Ctrl-C again ends")
        (tmp_path / "go").touch()
        assert terminal.wait() == 130
        lines = terminal.lines()
        assert lines[0] == "warm-up of 1 step, a tenth of the run, instead of 100"
        assert lines[1].startswith("runs/a b: ") and "compiling" not in "".join(lines)
        assert lines[-4].startswith("step  1/12 ━")
        assert lines[-3:] == [
            "saved at step 1; the same command continues",
            "runs/a b/report.html",
            "jaxlm sample 'runs/a b'",
        ]
    with start(tmp_path, "runs/a b") as terminal:
        assert terminal.wait() == 0
        lines = terminal.lines()
        assert lines[1].startswith("resumed at step 1 of 12 steps, on ")
        heads = [i for i, line in enumerate(lines) if line.startswith("--- sample at")]
        assert [lines[i] for i in heads] == [
            f"--- sample at step {step}" for step in (4, 8, 12)
        ]
        for i in heads:  # After the evaluation and a blank line; a text of two lines.
            assert "held-out loss" in lines[i - 2] and not lines[i - 1]
        assert lines[-3:] == [
            "saved at step 12",
            "runs/a b/report.html",
            "jaxlm sample 'runs/a b'",
        ]
    with start(tmp_path, "runs/a b") as terminal:
        assert terminal.wait() == 0
        assert terminal.lines() == [
            "runs/a b: all 12 steps are done, and the learning rate has decayed (wsd)",
            "to train its weights further: --init-from 'runs/a b' --train.run-dir NEW",
            "to start over: --fresh",
        ]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_that_compiles(tmp_path):
    with start(tmp_path, "b", rounds=10**9) as terminal:
        terminal.wait_for(r"(?m)^compiling the training step \.\.\. [1-9]\d* s")
        terminal.send(CTRL_C)
        terminal.wait_for("(?m)^stopping after this step and saving")
        time.sleep(0.2)  # One that comes at once is the same.
        terminal.send(CTRL_C)
        assert terminal.wait() == 130
        assert not terminal.cursor_is_hidden


def test_a_text_without_a_line_end_gives_the_prompt():
    """Its alphabet lacks the default prompt, which ended the run before its start."""
    config = Config(model=MODEL, data=DataConfig(sequence_length=32))
    assert with_prompt(config, CharTokenizer("ab\n")) == config
    assert with_prompt(config, ByteTokenizer()) == config
    assert with_prompt(config, CharTokenizer("ba")).train.sample_prompt == "a"
    chosen = dataclasses.replace(
        config, train=dataclasses.replace(config.train, sample_prompt="b")
    )
    assert with_prompt(chosen, CharTokenizer("ba")) == chosen


@pytest.mark.parametrize(
    "settings, numbers",
    [
        ({"eval_every": 10}, [0, 333, 666]),  # a tenth of ten steps, each three batches
        ({"eval_every": 1}, [0]),
        ({"eval_every": 0, "steps": 10}, [0, 333, 666]),
        ({"eval_batches": 2}, [0, 500]),
        ({"eval_batches": 0}, [*range(1000)]),
    ],
)
def test_an_evaluation_is_bounded_and_spread_over_the_text(settings, numbers):
    assert eval_batch_numbers(TrainConfig(**settings), 1000) == numbers


def test_processes_with_other_commands_are_refused(tmp_path, monkeypatch):
    data = make_data(tmp_path)
    config = Config(model=MODEL, data=dataclasses.replace(data, sequence_length=16))
    dataset = mock.Mock(fingerprint="text")

    def check(first, second):
        """Compares the configs and sources of two processes, in the second."""
        sent = []
        gather = mock.Mock(side_effect=lambda _, own: sent.append(own) or sent)
        for index, (config, source) in enumerate((first, second)):
            processes = mock.Mock(count=2, index=index, gather=gather)
            _check_same_run(config, dataset, source, processes)

    sources = []
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        files = [tmp_path / name]
        sources.append(mock.Mock(path=name, files=lambda files=files: files))
    prefetch = dataclasses.replace(config.data, prefetch=5)
    check(
        (config, sources[0]), (dataclasses.replace(config, data=prefetch), sources[0])
    )
    others = ({"fresh": True}, {"resume_step": 3}, {"sample": SampleConfig(top_k=3)})
    for other in others:
        [name] = other
        with pytest.raises(ValueError, match=f"{name}.* in process 0 and .* process 1"):
            check((config, None), (dataclasses.replace(config, **other), None))
    for source in (None, sources[1]):
        with pytest.raises(ValueError, match="fingerprint of --init-from is"):
            check((config, sources[0]), (config, source))
    flags = iter(["float32", "bfloat16"])  # as with an environment of its own
    monkeypatch.setattr(
        *(compatible, "_numerics"),
        lambda: {"jax_default_matmul_precision": next(flags)},
    )
    with pytest.raises(
        ValueError, match=r"precision is float32 in .* same command, env"
    ):
        check((config, None), (config, None))
