"""`--train.skip-batches`: no step trains on them, also when a run is resumed."""

import numpy as np
import pytest
from in_process_case import InProcess, batch_of, config_of, step_of

from jaxlm.checkpoint.native import compatible
from jaxlm.config import TrainConfig
from jaxlm.train import loop
from jaxlm.train.stopping import NotFinite

BAD = batch_of(99, np.nan)


@pytest.fixture(autouse=True)
def one_program(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", step_of)


def test_steps_take_the_other_batches_in_order():
    train = TrainConfig(skip_batches=("2:4", "5:6", "9:30"))
    skipped = {2, 3, 5, *range(9, 30)}
    wanted = [batch for batch in range(1, 40) if batch not in skipped]
    assert [train.batch_of(step + 1) for step in range(len(wanted))] == wanted


@pytest.mark.parametrize(
    "ranges, words",
    [
        (("5",), "is '5': it must be ranges such as 305:320"),
        (("-1:5",), "is '-1:5': it must be ranges"),
        (("0:5",), "is '0:5': it must be ranges such as 305:320, of numbers from 1"),
        (("1:2:3",), "it must be ranges"),
        (("a:b",), "it must be ranges"),
        (("5:5",), "is 5:5: the second number must be the larger"),
        (("7:5",), "is 7:5: the second number must be the larger"),
        (("5:7", "6:9"), "is 5:7 6:9: ranges must be in order"),
        (("5:7", "7:9"), "have other batches between them"),
        (("5:7", "1:2"), "ranges must be in order"),
        (("1:2147483648",), "numbers must be below 2**31"),
    ],
)
def test_other_ranges_are_refused(ranges, words):
    with pytest.raises(ValueError, match=r"^train\.skip_batches is ") as error:
        TrainConfig(skip_batches=ranges)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_without_batches_is_one_whose_steps_with_them_were_skipped(tmp_path):
    """Bit for bit; and a run that met them goes on from the step before."""
    bad = {5: BAD, 6: BAD}
    spikes = InProcess(tmp_path / "spikes", config_of(skip_spikes=3), bad)
    assert spikes.train() == 0
    run = InProcess(tmp_path / "run", config_of(checkpoint_every=4), bad)
    with pytest.raises(NotFinite, match="step 5: loss nan"):
        run.train()
    run.config = config_of(checkpoint_every=4, skip_batches=("5:7",))
    assert run.train(stop_at=8) == 75
    assert run.train(stop_at=10) == 75
    assert run.final["learned"] == spikes.final["learned"]
    assert run.final["state"] != spikes.final["state"]
    # Another choice is refused once it would have given other steps, not before.
    for ranges, is_free in (
        ((), False),
        (("5:6",), False),
        (("5:8",), False),
        (("3:4", "5:7"), False),
        (("5:7", "12:20"), False),
        (("5:7", "13:20"), True),
    ):
        other = config_of(skip_batches=ranges)
        if is_free:
            assert compatible.check_config(run.config, other, 10) == []
            continue
        with pytest.raises(
            ValueError, match=r"train\.skip_batches: 5:7 -> .*resume-st"
        ):
            compatible.check_config(run.config, other, 10)
