"""A stopped and resumed run equals an uninterrupted one, bit for bit.

Whole commands; `test_resume_matrix.py` has each step, each kind of state, and what is
seen when a part of the state is lost.
"""

import random
import shutil

import pytest
from run_case import CONFIG, STEPS, Run, differences


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


@pytest.mark.slow
@pytest.mark.parametrize("schedule, steps", [("constant", 6), ("wsd", 10)])
def test_a_run_made_longer_is_the_longer_run(folder, schedule, steps):
    """Constant: after its end. wsd: stopped before the decay of its last fifth."""
    config = CONFIG.replace(
        "OptimizerConfig(", f"OptimizerConfig(schedule={schedule!r}, "
    )
    long, short = (
        Run(folder, f"{schedule}1", config),
        Run(folder, f"{schedule}2", config),
    )
    assert long.train()[0] == 0
    if schedule == "wsd":
        assert short.train("--train.steps", str(steps), fault="SIGTERM@7")[0] == 75
        code, _, err = short.train("--train.steps", "7")
        assert code == 2 and "--train.steps: 10 -> 7, on which the wsd" in err
    else:
        assert short.train("--train.steps", str(steps))[0] == 0
        code, out, _ = short.train("--train.steps", str(steps))
        assert out.splitlines()[1] == f"to train on: --train.steps {2 * steps}"
    code, _, err = short.train()
    assert code == 0, err
    one, two = long.course(), short.course()
    # The shorter run has evaluated and sampled at its own end too.
    one["eval"] = [row for row in two["eval"] if row in one["eval"]]
    one["sample"] = [row for row in two["sample"] if row in one["sample"]]
    assert differences(one, two) <= {"eval", "sample"}
    assert len(one["eval"]) == 3 and len(one["sample"]) == 3


@pytest.mark.slow
def test_a_short_run_shortens_its_warm_up_and_resumes(folder):
    config = CONFIG.replace("warmup_steps=3", "warmup_steps=100")
    one, two = Run(folder, "warm1", config), Run(folder, "warm2", config)
    code, _, err = one.train()
    assert code == 0, err
    words = "warm-up of 1 step, a tenth of the run, instead of 100"
    assert err.count(words) == 1
    code, _, err = two.train(fault="SIGTERM@5")
    assert code == 75 and err.count(words) == 1
    assert "saved at step 5; the same command continues" in err
    code, _, err = two.train()
    assert code == 0 and words not in err, err
    assert "resumed at step 5 of 12 steps" in err and "saved at step 12" in err
    assert differences(one.course(), two.course()) == set()


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
def test_killed_at_any_moment(straight, seed):
    """kill -9 from outside after a random time, also while compiling and saving."""
    rng = random.Random(seed)
    run = Run(straight.folder, f"killed{seed}")
    for _ in range(5):
        child = run.start("--train.checkpoint-every", "1")
        try:
            child.wait(rng.uniform(2.0, 8.0))
            break
        except Exception:
            child.kill()
            child.wait()
        finally:
            child.stdout.close()
            child.stderr.close()
    code, _, err = run.train("--train.checkpoint-every", "1")
    assert code == 0, err
    assert differences(straight.course(), run.course()) == set()


@pytest.mark.slow
def test_the_program_itself(straight):
    """`python train.py` restarts itself to set an environment variable."""
    run = Run(straight.folder, "program")
    code, out, err = run.train(program=None)
    assert code == 0, err
    assert out.splitlines()[-1] == f"python sample.py {run.path}"
    run.record = straight.record
    assert differences(straight.course(), run.course()) == set()
