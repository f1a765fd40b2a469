"""A checkpoint that cannot be saved: the run stops, or goes on until the next one."""

import pytest
from in_process_case import InProcess, config_of, step_of

from jaxlm.checkpoint.native import checkpoint_manager, integrity
from jaxlm.checkpoint.native.save_error import SaveError
from jaxlm.train import loop
from jaxlm.train.metrics import read_metrics


@pytest.fixture
def full(monkeypatch):
    """A set of steps at which the disk is full."""
    monkeypatch.setattr(loop, "make_train_step", step_of)
    monkeypatch.setattr(checkpoint_manager, "RETRY_SECONDS", 0.0)
    real, steps = integrity.write_manifest, set()

    def write_manifest(folder, entries):
        step = int(folder.name.split("-")[1])  # .tmp-STEP-N
        if step in steps:
            raise OSError(27, "x")
        real(folder, entries)

    monkeypatch.setattr(integrity, "write_manifest", write_manifest)
    return steps


def saved(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir())


def failures(folder):
    rows = [r for r in read_metrics(folder) if r.get("event") == "save failed"]
    return [(r["step"], r["message"].partition(" cannot")[0][-2:]) for r in rows]


@pytest.mark.slow
def test_the_run_stops_or_goes_on_and_nothing_good_is_deleted(tmp_path, full):
    straight = InProcess(tmp_path / "straight", config_of(checkpoint_every=2))
    assert straight.train() == 0
    full |= {6, 8}
    stops = InProcess(tmp_path / "stops", straight.config)
    with pytest.raises(SaveError, match=r"checkpoints/8 cannot be written .*too large"):
        stops.train()
    assert saved(stops.folder) == [2, 4]
    assert failures(stops.folder) == [(8, "/6")]
    goes_on = InProcess(
        tmp_path / "on", config_of(checkpoint_every=2, on_save_error="continue")
    )
    assert goes_on.train(stop_at=9) == 75
    assert saved(goes_on.folder) == [4, 9]
    # Rows of the step at which the run learned of it, and named with what failed.
    assert failures(goes_on.folder) == [(8, "/6"), (9, "/8")]
    assert (
        goes_on.shown.getvalue().count("; earlier steps are intact; the run goes") == 2
    )
    full.clear()
    for run in (stops, goes_on):
        assert run.train() == 0
        assert run.course() == straight.course()


@pytest.mark.slow
def test_the_last_state_must_be_saved_whatever_failed_before(tmp_path, full):
    """With `stop` too: the process ends anyway, and the disk may have room again."""
    full |= {4}
    run = InProcess(tmp_path, config_of(checkpoint_every=4))
    assert run.train(stop_at=5) == 75
    assert saved(tmp_path) == [5] and failures(tmp_path) == [(5, "/4")]
    full |= {12}
    run.config = config_of(checkpoint_every=4, on_save_error="continue")
    with pytest.raises(SaveError, match="checkpoints/12 cannot be written"):
        run.train()
    assert saved(tmp_path) == [5, 8]
