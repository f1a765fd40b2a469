"""Where the time of a run goes, over its starts."""

import pytest

from jaxlm.config import ProfileConfig
from jaxlm.report.curves import Run, figures
from jaxlm.train.metrics import MetricsWriter
from jaxlm.train.run_log import KINDS, Goodput

ROW = dict.fromkeys(
    ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_wait_s", "step_s"), 0.5
)


def write(writer, step, goodput):
    row = {**ROW, "tokens": step, "wall_s": 1.0, "time_s": goodput.seconds}
    writer.write("train", step, **row)


def test_steps_done_again_are_lost_and_the_rest_is_kept(tmp_path):
    """A run is killed at step 9 and goes on from step 5."""
    with MetricsWriter(tmp_path) as writer:
        goodput = Goodput(writer.last_train, writer.last_before)
        assert goodput.seconds == dict.fromkeys(KINDS, 0.0)
        for step in range(1, 10):
            goodput.add("steps", 2.0)
            goodput.add("data", 0.25)
            write(writer, step, goodput)
    with MetricsWriter(tmp_path, resume_step=5) as writer:
        goodput = Goodput(writer.last_train, writer.last_before)
        assert goodput.seconds["steps"] == 10
        assert goodput.seconds["lost"] == 8
        assert goodput.seconds["data"] == 2.25
        goodput.add("steps", 2.0)
        write(writer, 6, goodput)
    # Stopped after a save, it loses nothing more.
    with MetricsWriter(tmp_path, resume_step=6) as writer:
        goodput = Goodput(writer.last_train, writer.last_before)
    assert (goodput.seconds["steps"], goodput.seconds["lost"]) == (12, 8)

    rows = [{"kind": "train", "step": 6, **ROW, "time_s": goodput.seconds}]
    shown = figures(Run("a", rows, {}))
    assert shown["Goodput (share of the time in steps that count)"] == "53.9 %"
    assert shown["Other time"] == "lost 36.0 %, data 10.1 %"


def test_a_row_of_an_earlier_version_has_no_times():
    goodput = Goodput({"step": 3}, {"step": 5})
    assert not any(goodput.seconds.values())


@pytest.mark.parametrize("steps", ["10", "20:10", "0:4", "a:b", "5:5"])
def test_a_wrong_range_of_steps_to_trace(steps):
    with pytest.raises(ValueError, match=r"profile\.steps is .*such as 10:20"):
        ProfileConfig(steps=steps)
