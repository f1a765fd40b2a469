"""The report of a run in progress: when it is written, and what a failure costs."""

import json
import re
import shutil
import time

import pytest
from report_case import make_run

from jaxlm.report import curves, live
from jaxlm.report.live import LiveReport
from jaxlm.train.metrics import MetricsWriter, read_metrics


class Clock:
    """A clock that moves when it is told to."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def writes(monkeypatch):
    """Replaces the two writers by ones that take `seconds`; returns their calls."""

    class Calls(list):
        clock, seconds = Clock(), 0.1

    calls = Calls()

    def draw(run, out):
        calls.clock.now += calls.seconds

    monkeypatch.setattr(live, "load_runs", lambda run: [])
    monkeypatch.setattr(live, "write_report", lambda *_, next_s: calls.append(next_s))
    monkeypatch.setattr(live, "draw_loss_png", draw)
    return calls


def test_evaluations_are_shown_at_once_and_training_rows_now_and_then(tmp_path, writes):
    clock = writes.clock
    report = LiveReport(tmp_path, clock)
    for kind, seconds, count in (
        *(("event", 0, 1), ("train", 1, 1), ("eval", 1, 2), ("train", 1, 2)),
        *(("sample", 1, 3), ("train", 14, 3), ("train", 1, 4), ("train", 1, 4)),
        ("eval", 100, 5),
    ):
        clock.now += seconds
        report.write({"kind": kind, "step": 1})
        assert len(writes) == count, (kind, seconds)
    # The page expects the next one after as long as the last one took to come.
    assert writes[:4] == [15.0] * 3 + [pytest.approx(15.0)] and writes[4] > 100
    report.close(failed=True)
    assert writes[5] is None


def test_writes_take_a_hundredth_of_the_run(tmp_path, writes):
    clock, writes.seconds = writes.clock, 2.0
    report = LiveReport(tmp_path, clock)
    for _ in range(10_000):
        clock.now += 1.0
        report.write({"kind": "eval", "step": 1})
    share = sum(writes.seconds for _ in writes) / (clock.now - 1000)
    assert 0.009 < share < 0.011


def break_nothing(run):
    pass


def folder_in_the_way(run):
    (run / "report.html").mkdir()


def folder_is_gone(run):
    shutil.rmtree(run)


def rows_are_unreadable(run):
    (run / "metrics.jsonl").write_text("x\n\n\ny\n")


@pytest.mark.parametrize(
    "damage, words",
    [
        (break_nothing, None),
        (folder_in_the_way, "report.html"),
        (folder_is_gone, "metrics.jsonl: no such file"),
        (rows_are_unreadable, "metrics.jsonl, line 1: not JSON"),
    ],
)
def test_a_failure_costs_one_line(tmp_path, caplog, damage, words):
    run = make_run(tmp_path / "run", [3.0, 2.0], evals=[(20, 2.5)])
    report = LiveReport(run)
    damage(run)
    report.write({"kind": "eval", "step": 20})
    report.write({"kind": "eval", "step": 20})
    report.close()
    if words is None:
        assert caplog.messages == []
        names = sorted(path.name for path in run.iterdir())
        assert names == ["config.json", "loss.png", "metrics.jsonl", "report.html"]
    else:
        (line,) = caplog.messages
        assert line.startswith("the report cannot be written: ") and words in line
        assert "\n" not in line


def test_the_picture_is_drawn_even_if_the_page_cannot_be(tmp_path, caplog):
    run = make_run(tmp_path / "run", [3.0, 2.0])
    (run / "report.html").mkdir()
    LiveReport(run).close()
    assert (run / "loss.png").is_file() and len(caplog.messages) == 1


def test_the_rows_are_read_once_for_both_files(tmp_path, monkeypatch):
    run, reads = make_run(tmp_path / "run", [3.0, 2.0]), []
    monkeypatch.setattr(
        curves, "read_metrics", lambda path: reads.append(path) or read_metrics(path)
    )
    LiveReport(run).close()
    assert reads == [run] and (run / "loss.png").is_file()


def test_only_the_last_page_does_not_reload(tmp_path):
    run = make_run(tmp_path / "run", [3.0, 2.0], evals=[(20, 2.5)])
    report, found = LiveReport(run), []
    report.write({"kind": "event", "step": 0})  # a page from the start
    for _ in range(2):
        text = (run / "report.html").read_text()
        found.append(json.loads(re.search(r'id="data">(.*)</script>', text)[1]))
        report.close()
    assert found[0]["live"]["next_s"] == 15.0
    assert found[0]["live"]["written_s"] == pytest.approx(time.time(), abs=600)
    assert "live" not in found[1]


def test_a_failure_does_not_hide_why_a_run_ended(tmp_path, caplog):
    run = tmp_path / "run"
    run.mkdir()
    folder_in_the_way(run)
    sinks = [LiveReport(run)]
    with pytest.raises(KeyError), MetricsWriter(run, sinks=sinks):
        raise KeyError
    assert len(caplog.messages) == 1
