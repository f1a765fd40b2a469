"""Reading run folders, and downsampling and smoothing their curves."""

import math

import numpy as np
import pytest
from report_case import make_run

from jaxlm.report.curves import bucket_means, column, downsample, load_runs, smooth


@pytest.mark.parametrize("n", [0, 1, 20, 21, 1000, 100_000])
def test_downsampling_keeps_extremes_and_ends(n):
    values = np.random.default_rng(n).normal(size=n)
    kept = downsample(values, 20)
    assert len(kept) <= 20 and (np.diff(kept) > 0).all()
    if n:
        assert kept[0] == 0 and kept[-1] == n - 1
        assert values.argmin() in kept and values.argmax() in kept


def test_means_of_buckets_ignore_non_finite_values():
    middles, means = bucket_means(np.array([1.0, 3.0, math.nan, 5.0, math.inf, 7.0]), 3)
    assert middles.tolist() == [0, 2, 4] and means.tolist() == [2.0, 5.0, 7.0]


def test_smoothing_keeps_lines_and_gaps():
    line = np.linspace(4.0, 1.0, 101)
    # Symmetric windows leave a straight line as it is, but where the end cuts them.
    np.testing.assert_allclose(smooth(line, 5)[:90], line[:90], rtol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=101) * 0.1
    noisy[50] = math.nan
    flat = smooth(noisy, 5)
    assert math.isnan(flat[50]) and np.isfinite(np.delete(flat, 50)).all()
    assert np.nanstd(flat - line) < 0.5 * np.nanstd(noisy - line)


def test_equal_names_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / part / "run", [2.0]) for part in ("x", "y")]
    assert [run.name for run in load_runs(runs)] == ["x/run", "y/run"]
    assert [run.name for run in load_runs([runs[0], runs[0]])] == ["run", "run"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no run folder was given"):
        load_runs([])
    with pytest.raises(ValueError, match=r"gone/metrics\.jsonl: no such file"):
        load_runs([tmp_path / "gone"])
    run = make_run(tmp_path / "run", [2.0, 2.0])
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_runs(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "rubbish", lines[1], ""]))
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        load_runs(run)


def test_a_number_that_no_float_can_hold_is_none():
    rows = [{"a": 10**400}, {"a": 2}, {"a": math.inf}, {"a": "x"}, {}]
    assert str(column(rows, "a")) == "[nan  2. inf nan nan]"
