"""How a run ends: exit codes, the files left behind, and rejected runs."""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from run_case import CONFIG, Run

from jaxlm import tree
from jaxlm.checkpoint.load import load
from jaxlm.checkpoint.native.integrity import state_hash
from jaxlm.train.metrics import read_metrics

SHORT = ("--train.steps", "4", "--train.checkpoint-every", "2")
BASE = CONFIG.replace("sample_tokens=8", "sample_tokens=0")


@pytest.fixture(scope="module")
def folder():
    """A short path, as messages are cut."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def done(folder):
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    run = Run(folder, "done", BASE)
    code, _, err = run.train(*SHORT)
    assert code == 0, err
    assert run.steps() == [2, 4]
    return run


def copy_of(run, name):
    other = Run(run.folder, name, BASE)
    shutil.copytree(run.path, other.path)
    return other


def one_line(err):
    """Returns the message, which is one line without a traceback."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_4_and_saves_nothing(done):
    run = copy_of(done, "nan")
    code, _, err = run.train(
        *("--train.steps", "12", "--fresh", "--train.checkpoint-every", "2"),
        fault="nan@5",
    )
    assert code == 4
    message = one_line(err)
    assert "step 5: loss nan, gradient norm nan: not finite" in message
    assert "lower --optimizer.learning-rate or look at the batch" in message
    assert run.steps() == [2, 4]
    _, params = load(run.path)
    assert all(np.isfinite(x).all() for x in tree.flatten(params).values())
    trains = [r for r in read_metrics(run.path) if r["kind"] == "train"]
    assert [r["step"] for r in trains] == [1, 2, 3, 4]
    # --fresh has moved the whole earlier run aside.
    old, _ = load(run.path / "old-1")
    assert old.num_layers == 2
    assert (run.path / "old-1" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_when_no_checkpoint_can_be_read_the_code_is_3(done):
    run = copy_of(done, "broken")
    for step in run.steps():
        meta = run.path / "checkpoints" / str(step) / "meta.json"
        meta.write_text(meta.read_text().replace("0", "1", 1))
    code, _, err = run.train("--train.steps", "4")
    assert code == 3
    message = one_line(err)
    assert f"no usable checkpoint in {run.path}" in message
    assert "step 4 unreadable" in message and "step 2 unreadable" in message
    assert "--fresh" in message
    assert run.steps() == [2, 4]  # it does not start over by itself


@pytest.mark.slow
def test_an_earlier_step_is_continued_without_some_batches(done):
    """It is the run that never had them; what was saved later moves to a folder."""
    run = copy_of(done, "earlier")
    other = ("--train.skip-batches", "3:5")
    for flags, words in (
        (("--resume-step", "3"), "has no checkpoint of step 3: it has steps 2, 4"),
        (("--resume-step", "2", "--fresh"), "leave it or --resume-step out"),
        (other, "3:5, but the first 4 steps have had other batches; --resume-step"),
    ):
        code, _, err = run.train(*SHORT, *flags)
        assert code == 2 and words in one_line(err), err
    assert run.steps() == [2, 4]
    code, _, err = run.train(*(*SHORT, *other, "--resume-step", "2"), fault="SIGTERM@3")
    assert code == 75, err
    old = run.path / "old-1"
    assert f"moved steps 4 to {old}: the run continues from 2" in err
    assert "batches 3 to 4 are skipped" in err
    assert "saved at step 3; the same command without --resume-step continues" in err
    assert [r["step"] for r in read_metrics(old) if r["kind"] == "train"][-1] == 4
    assert load(old)[0].num_layers == 2
    assert run.train(*SHORT, *other)[0] == 0
    straight = Run(run.folder, "without", BASE)
    assert straight.train(*SHORT, *other)[0] == 0
    assert run.meta(4)["state_hash"] == straight.meta(4)["state_hash"]
    assert run.meta(4)["state_hash"] != done.meta(4)["state_hash"]


@pytest.mark.slow
def test_another_model_is_refused_field_by_field(done):
    before = done.steps()
    code, _, err = done.train(
        *SHORT, *("--model.num-layers", "3", "--optimizer.b1", "0.8")
    )
    assert code == 2
    message = one_line(err)
    assert "--model.num-layers: 2 -> 3; --optimizer.b1: 0.9 -> 0.8" in message
    assert "--fresh" in message and "--init-from" in message
    assert done.steps() == before


@pytest.mark.slow
def test_another_text_is_refused(done):
    run = copy_of(done, "text")
    text = run.folder / "other.txt"
    text.write_text((run.folder / "text.txt").read_text() + "abc")
    run.config.write_text(
        run.config.read_text().replace(str(run.folder / "text.txt"), str(text))
    )
    code, _, err = run.train("--train.steps", "4")
    assert code == 2 and "data.path" in one_line(err)
    # The same file, longer than when the run began.
    run = copy_of(done, "longer")
    text = run.folder / "text.txt"
    whole = text.read_text()
    text.write_text(whole + "abc")
    try:
        code, _, err = run.train(*SHORT)
        assert code == 2 and f"{text} (900 -> 903 bytes): " in one_line(err)
        assert "--data.old-tokens goes on with the tokens" in err
        code, out, err = run.train(*SHORT, "--data.old-tokens")
        assert code == 0 and "all 4 steps are done" in out, err
    finally:
        text.write_text(whole)


@pytest.mark.slow
def test_init_from_takes_the_weights_and_starts_at_step_0(done):
    run = Run(done.folder, "started", BASE)
    # A rate near 0 leaves the weights unchanged for the comparison.
    code, _, err = run.train(
        *("--init-from", str(done.path), "--train.steps", "1"),
        *("--optimizer.learning-rate", "1e-30", "--optimizer.warmup-steps", "0"),
    )
    assert code == 0, err
    events = [r for r in read_metrics(run.path) if r["kind"] == "event"]
    assert next((e["event"], e["step"]) for e in events) == ("start", 0)
    assert run.steps() == [1]
    assert state_hash(load(run.path)[1]) == state_hash(load(done.path)[1])


@pytest.mark.slow
def test_init_from_refuses_another_shape(done):
    run = Run(done.folder, "shapes", BASE)
    code, _, err = run.train(
        *("--init-from", str(done.path), "--model.hidden-dim", "64")
    )
    assert code == 2
    assert (
        f"the model of --init-from {done.path} is another one (--model.hidden-dim: "
        "48 -> 64): leave out the --model flags that change it"
    ) in one_line(err)
    code, _, err = done.train("--init-from", "no-such-run")
    assert code == 2 and "no-such-run" in one_line(err)
    assert one_line(err).endswith(f" goes on with --init-from {done.path}")


@pytest.mark.slow
def test_a_second_run_in_one_folder_is_refused_and_a_second_signal_ends_at_once(done):
    run = copy_of(done, "twice")
    flags = ("--train.steps", "12", "--train.checkpoint-every", "2")
    child = run.start(*flags, "--fresh", fault="wait@4")
    try:
        child.wait_for("waiting\n")
        other = Run(run.folder, "other", BASE)  # whose output is in other files
        code, _, err = other.train(*flags, "--train.run-dir", str(run.path))
        assert code == 2
        message = one_line(err)
        assert f"another process (pid {child.pid} on " in message
        assert f") is training in {run.path}: " in message
        # A terminal that is closed, with a shell in it: the same request.
        os.kill(child.pid, signal.SIGHUP)
        while "stopping after this step" not in child.err:
            assert child.code is None
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGHUP)
        time.sleep(0.3)  # It would finish its step, which never ends.
        os.kill(child.pid, signal.SIGINT)
        assert child.wait() == 130
    finally:
        child.kill()
        child.wait()
    assert run.steps() == [2]
    _, params = load(run.path)
    assert all(np.isfinite(x).all() for x in tree.flatten(params).values())


@pytest.mark.slow
def test_a_rate_far_too_large_ends_with_4(done):
    run = Run(done.folder, "rate", BASE)
    code, _, err = run.train(
        *("--optimizer.learning-rate", "1e30", "--optimizer.warmup-steps", "0"),
        *("--optimizer.clip-norm", "None", "--train.log-every", "5"),
    )
    assert code == 4 and "not finite" in one_line(err)
    assert run.path.exists()
    for step in run.steps():
        _, params = load(run.path / "checkpoints" / str(step))
        assert all(np.isfinite(x).all() for x in tree.flatten(params).values())


@pytest.mark.slow
def test_impossible_flags_end_with_2(done):
    run = Run(done.folder, "flags", BASE)
    for flags, words in (
        (
            ("--mesh.tensor", "3"),
            "--mesh.data -1 x --mesh.fsdp 1 x --mesh.expert 1 x --mesh.context 1 x --mesh.tensor 3 does not use the 1",
        ),
        (("--model.vocab-size", "3"), "--model.vocab-size is 3, but the tokenizer has"),
        (("--data.path", "/no/such.txt"), "/no/such.txt"),
    ):
        code, _, err = run.train(*flags)
        assert code == 2 and words in one_line(err), err
