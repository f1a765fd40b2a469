"""`jaxlm report`: the files it writes, and where."""

import json
import os

import pytest

from jaxlm.cli import main
from jaxlm.train.metrics import FIELDS, MetricsWriter


def run_folder(folder, losses):
    with MetricsWriter(folder) as writer:
        for step, loss in enumerate(losses, start=1):
            row = dict.fromkeys(FIELDS["train"], 1.0)
            writer.write("train", step, **{**row, "loss": loss})
    return folder


def test_report_of_one_run(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [3.0, 2.0, 1.0])
    main(["report", str(run)])
    out = capsys.readouterr().out.splitlines()
    assert out == [str(run / "report.html"), str(run / "loss.png")]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (run / "report.html").read_text()


def test_report_of_several_runs(tmp_path, capsys, monkeypatch):
    runs = [str(run_folder(tmp_path / n, [3.0, 2.0])) for n in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    main(["report", *runs])
    assert {"comparison.html", "comparison.png"} <= set(os.listdir(tmp_path))
    main(["report", *runs, "--out", "both.html"])
    assert {"both.html", "both.png"} <= set(os.listdir(tmp_path))
    for name in ("one", "two"):
        assert name in (tmp_path / "both.html").read_text()
        assert os.listdir(tmp_path / name) == ["metrics.jsonl"]  # nothing left there


def test_a_damaged_metrics_file_is_named(tmp_path, capsys):
    run = run_folder(tmp_path / "run", [3.0])
    with open(run / "metrics.jsonl", "a") as file:
        file.write("nonsense\n" + json.dumps({"kind": "event", "step": 1}) + "\n")
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(run)])
    assert "metrics.jsonl, line 2: not JSON" in capsys.readouterr().err
