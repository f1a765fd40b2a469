"""A stopped and resumed run equals an uninterrupted one, bit for bit.

Whole commands; `test_resume_matrix.py` has each step, each kind of state, and what is
seen when a part of the state is lost.
"""

import os
import random
import shutil
import subprocess
import sys

import pytest
from run_case import CONFIG, REPOSITORY, STEPS, Run, differences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(folder):
    run = Run(folder, "straight")
    code, out, err = run.train()
    assert code == 0, err
    assert out.splitlines() == [
        str(run.path / "report.html"),
        f"python sample.py {run.path}",
    ]
    return run


@pytest.fixture(scope="module")
def stopped(folder, straight):
    """A run that received SIGTERM at its fifth step."""
    run = Run(folder, "stopped")
    code, _, err = run.train(fault="SIGTERM@5")
    assert code == 75, err
    assert run.steps() == [3, 5]
    return run


def copy_of(run, name):
    other = Run(run.folder, name)
    shutil.copytree(run.path, other.path)
    shutil.copy(run.record, other.record)
    return other


@pytest.mark.slow
def test_every_step_is_written_once(straight):
    course = straight.course()
    assert [row[0] for row in course["train"]] == list(range(1, STEPS + 1))
    assert course["tokens"] == [128 * step for step in range(1, STEPS + 1)]
    assert sorted(course["batches"]) == list(range(1, STEPS + 1))
    assert [row[0] for row in course["eval"]] == [5, 10, 12]
    assert [row[0] for row in course["sample"]] == [4, 8, 12]
    # It learns: two runs that do nothing would also be equal.
    losses = [float.fromhex(row[1]) for row in course["train"]]
    assert len(set(losses)) == STEPS and losses[-1] < losses[0]
    assert straight.steps() == [9, 12]
    for name in ("config.json", "report.html", "loss.png"):
        assert (straight.path / name).stat().st_size > 0


@pytest.mark.slow
def test_stopped_in_every_way_and_resumed_is_the_same(stopped, straight):
    """SIGTERM, kill -9 and Ctrl-C in one run, across two epochs."""
    run = copy_of(stopped, "resumed")
    kill_at = random.Random(0).randint(7, 9)
    code, _, _ = run.train(fault=f"SIGKILL@{kill_at}")
    assert code == -9
    code, _, err = run.train(fault="SIGINT@10")
    assert code == 130, err
    assert run.steps()[-1] == 10
    code, out, err = run.train()
    assert code == 0, err
    assert "not be bit-identical" not in err
    assert differences(straight.course(), run.course()) == set()
    # Another start has nothing to do, and says what can be done.
    code, out, _ = run.train()
    assert code == 0 and out.splitlines() == [
        f"{run.path}: all 12 steps are done, and the learning rate has decayed (cosine)",
        f"to train its weights further: --init-from {run.path} --train.run-dir NEW",
        "to start over: --fresh",
    ]


@pytest.mark.slow
def test_stopped_in_evaluations_and_resumed_is_the_same(straight):
    """Also in that of the last step, and by kill -9 and SIGHUP."""
    run = Run(straight.folder, "evaluations")
    code, _, err = run.train(fault="evaluation-SIGHUP@1")
    assert code == 75 and "saved at step 5" in err, err
    assert run.steps() == [3, 5]
    code, _, err = run.train(fault="evaluation-SIGKILL@2")
    assert code == -9
    code, _, err = run.train(fault="evaluation-SIGTERM@2")
    assert code == 75 and run.steps()[-1] == 12, err
    code, _, err = run.train()
    assert code == 0 and "held-out loss" in err, err
    assert differences(straight.course(), run.course()) == set()
    assert "all 12 steps are done" in run.train()[1]


def with_schedule(name):
    """The config with another schedule; the runs above show what samples are."""
    config = CONFIG.replace("sample_every=4", "sample_every=0")
    return config.replace("OptimizerConfig(", f"OptimizerConfig(schedule={name!r}, ")


def check_longer(long, short):
    one, two = long.course(), short.course()
    # The shorter run has evaluated at its own end too.
    one["eval"] = [row for row in two["eval"] if row in one["eval"]]
    assert differences(one, two) <= {"eval"}
    assert len(one["eval"]) == 3


@pytest.mark.slow
def test_a_run_made_longer_after_its_end_is_the_longer_run(folder):
    config = with_schedule("constant")
    long, short = Run(folder, "constant1", config), Run(folder, "constant2", config)
    assert long.train()[0] == 0
    assert short.train("--train.steps", "6")[0] == 0
    code, out, _ = short.train("--train.steps", "6")
    assert out.splitlines()[1] == "to train on: --train.steps 12"
    code, _, err = short.train()
    assert code == 0, err
    check_longer(long, short)


@pytest.mark.slow
def test_a_run_made_longer_before_its_decay_is_the_longer_run(folder):
    """wsd decays in the last fifth. The warm-up is shortened, for both alike."""
    config = with_schedule("wsd").replace("warmup_steps=3", "warmup_steps=100")
    words = "warm-up of 1 step, a tenth of the run, instead of 100"
    long, short = Run(folder, "wsd1", config), Run(folder, "wsd2", config)
    code, _, err = long.train()
    assert code == 0 and err.count(words) == 1, err
    code, _, err = short.train("--train.steps", "10", fault="SIGTERM@7")
    assert code == 75 and err.count(words) == 1, err
    assert "saved at step 7; the same command continues" in err
    code, _, err = short.train("--train.steps", "7")
    assert code == 2 and "--train.steps: 10 -> 7, on which the wsd" in err
    code, _, err = short.train()
    assert code == 0 and words not in err, err
    assert "resumed at step 7 of 12 steps" in err and "saved at step 12" in err
    check_longer(long, short)


@pytest.mark.slow
def test_batches_in_another_order_show(stopped, straight):
    run = copy_of(stopped, "swap")
    code, _, err = run.train(fault="swap@8")
    assert code == 0, err
    assert differences(straight.course(), run.course()) >= {"state", "train", "batches"}


@pytest.mark.slow
def test_another_seed_shows(straight):
    run = Run(straight.folder, "seed")
    code, _, err = run.train("--train.seed", "1")
    assert code == 0, err
    assert {"state", "train", "eval", "batches"} <= differences(
        straight.course(), run.course()
    )


@pytest.mark.slow
def test_stopped_again_and_again(straight):
    """Five processes, each ended by the time limit, SIGTERM or kill -9."""
    run = Run(straight.folder, "steps")
    code, _, err = run.train("--train.max-minutes", "0.0001")
    assert code == 75, err
    assert run.steps() == [1]
    for step in (2, 7):
        code, _, err = run.train(fault=f"SIGTERM@{step}")
        assert code == 75, err
        code, _, _ = run.train(fault=f"SIGKILL@{step + 1}")
        assert code == -9
    assert run.train()[0] == 0
    assert differences(straight.course(), run.course()) == set()


@pytest.mark.parametrize(
    "seed, kills",
    [
        pytest.param(1, 3, marks=pytest.mark.slow),
        pytest.param(0, 9, marks=pytest.mark.nightly),
    ],
)
def test_killed_at_any_moment(straight, seed, kills):
    """kill -9 from outside after a random time, also while compiling and saving."""
    rng = random.Random(seed)
    run = Run(straight.folder, f"killed{seed}")
    for _ in range(kills):
        child = run.start("--train.checkpoint-every", "1")
        if child.wait(rng.uniform(0.2, 6.0)) is not None:
            break
        child.kill()
        child.wait()
    code, _, err = run.train("--train.checkpoint-every", "1")
    assert code == 0, err
    assert differences(straight.course(), run.course()) == set()


@pytest.mark.slow
def test_the_program_itself(straight):
    """`python train.py` restarts itself to set an environment variable."""
    run = Run(straight.folder, "program")
    child = subprocess.run(
        [sys.executable, REPOSITORY / "train.py", run.config],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        **{"capture_output": True, "text": True, "timeout": 1000},
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == f"python sample.py {run.path}"
    run.record = straight.record
    assert differences(straight.course(), run.course()) == set()
