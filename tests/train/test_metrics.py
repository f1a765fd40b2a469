"""metrics.jsonl, and the rates in it."""

import errno
import io
import json
import math
import os
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_case import toy

from jaxlm.config import Config, ModelConfig, TrainConfig
from jaxlm.model.params import count_matmul_params
from jaxlm.terminal.progress import ProgressLine
from jaxlm.train import loop
from jaxlm.train.loop import Hooks
from jaxlm.train.metrics import MetricsWriter, kinds_at, read_metrics
from jaxlm.train.run_log import RunLog
from jaxlm.train.state import TrainState
from jaxlm.train.throughput import (
    flops_per_token,
    peak_flops,
    published_peak_flops,
)


def train_row(step: int, **changes):
    row = {
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 1000.0,
        "mfu": 0.3,
        "data_wait_s": 0.0,
        "step_s": 0.1,
        "tokens": step * 100,
        "wall_s": step * 0.1,
    }
    return {**row, **changes}


def write_steps(folder, steps, **kwargs):
    with MetricsWriter(folder, **kwargs) as writer:
        for step in steps:
            writer.write("train", step, **train_row(step))


def steps_of(folder):
    return [row["step"] for row in read_metrics(folder)]


def test_floats_read_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    # Bit patterns over the whole range of f64; some are NaN.
    values = rng.integers(0, 2**64, 500, dtype=np.uint64).view(np.float64)
    values = [float(v) for v in values] + [0.1 + 0.2, 5e-324, -0.0, 1.7e308]
    with MetricsWriter(tmp_path) as writer:
        for step, value in enumerate(values):
            writer.write("train", step, **train_row(step, loss=value))
    read = [row["loss"] for row in read_metrics(tmp_path)]
    assert np.array(read).tobytes() == np.array(values).tobytes() or all(
        a.hex() == b.hex() for a, b in zip(read, values, strict=True)
    )


def test_numpy_and_jax_scalars_are_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(
            "train",
            3,
            **train_row(
                3, loss=np.float32(0.1), lr=jnp.float32(0.3), tokens=np.int32(7)
            ),
        )
    (row,) = read_metrics(tmp_path)
    assert row["step"] == 3 and row["tokens"] == 7
    assert row["loss"] == float(np.float32(0.1)) and row["lr"] == float(np.float32(0.3))


def test_non_finite_values_are_valid_json_and_read_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        row = train_row(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf)
        writer.write("train", 1, **row)
        writer.write("sample", 1, text="nan", prompt="inf")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    raw = [json.loads(line, parse_constant=refuse) for line in lines]
    assert (raw[0]["loss"], raw[0]["grad_norm"], raw[0]["lr"]) == ("nan", "inf", "-inf")
    train, sample = read_metrics(tmp_path)
    assert math.isnan(train["loss"])
    assert (train["grad_norm"], train["lr"]) == (math.inf, -math.inf)
    assert (sample["text"], sample["prompt"]) == ("nan", "inf")  # texts are not decoded


def test_any_text_survives(tmp_path):
    text = 'a\nb\r"\\ \u2028 \x00 é 猫 \ud800'
    with MetricsWriter(tmp_path) as writer:
        writer.write("sample", 1, text=text, prompt="")
    assert read_metrics(tmp_path)[0]["text"] == text


def test_resume_drops_later_rows_and_nothing_twice(tmp_path):
    write_steps(tmp_path, range(10, 101, 10))
    with MetricsWriter(tmp_path, resume_step=55) as writer:
        assert writer.last_train is not None and writer.last_train["tokens"] == 5000
        writer.write("event", 55, event="resume")
        for step in range(60, 101, 10):
            writer.write("train", step, **train_row(step))
    assert steps_of(tmp_path) == [10, 20, 30, 40, 50, 55, 60, 70, 80, 90, 100]
    # They may not be repeated as they were.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.jsonl", "metrics.dropped.jsonl"}
    dropped = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped] == [60, 70, 80, 90, 100]


def test_resume_leaves_kept_lines_as_they_are(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    MetricsWriter(tmp_path, resume_step=3).close()
    assert path.read_bytes() == before
    MetricsWriter(tmp_path, resume_step=2).close()
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])


def test_a_new_run_starts_empty_and_keeps_old_rows_aside(tmp_path):
    write_steps(tmp_path, [1, 2])
    old = (tmp_path / "metrics.jsonl").read_bytes()
    write_steps(tmp_path, [7])
    write_steps(tmp_path, [8])
    assert steps_of(tmp_path) == [8]
    assert (tmp_path / "metrics.previous.jsonl").read_bytes() == old
    assert b'"step": 7' in (tmp_path / "metrics.previous-2.jsonl").read_bytes()


def test_a_log_that_somebody_cuts_or_adds_to_loses_no_row(tmp_path):
    """As logrotate's copytruncate, or an editor."""
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(tmp_path / "metrics.damaged.jsonl")  # would be waited for
    with MetricsWriter(tmp_path) as writer:
        for step, odd in enumerate((None, b"", b"half a line", None), start=1):
            if odd is not None:
                path.write_bytes(odd)
            writer.write("train", step, **train_row(step))
        with path.open("ab") as file:
            file.write(b"a note\n")
        writer.write("train", 5, **train_row(5))
        writer.write("train", 6, **train_row(6))
    with MetricsWriter(tmp_path, resume_step=6):
        assert steps_of(tmp_path) == [3, 4, 5, 6]
    set_aside = (tmp_path / "metrics.damaged-2.jsonl").read_bytes()
    assert set_aside == b"half a line\na note\n"


@pytest.mark.parametrize("cut", [1, 30, "zeros", "only the newline"])
def test_a_half_written_last_line_is_repaired(tmp_path, cut):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    data = path.read_bytes()
    last = len(data.rstrip(b"\n").rsplit(b"\n", 1)[1])
    if cut == "zeros":
        path.write_bytes(data[: -last - 1] + bytes(40) + b"\n")
    elif cut == "only the newline":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[: -last - 1 + cut])
    whole = [1, 2, 3] if cut == "only the newline" else [1, 2]
    assert steps_of(tmp_path) == whole
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write("train", 4, **train_row(4))
    assert steps_of(tmp_path) == [*whole, 4]


def test_the_log_of_a_run_that_has_taken_the_name_is_left_alone(tmp_path, caplog):
    run, own = tmp_path / "run", []
    with MetricsWriter(run, is_own=lambda: not own or run.stat() in own) as writer:
        writer.write("event", 0, event="start")
        own.append(run.stat())
        run.rename(tmp_path / "moved")
        with MetricsWriter(run) as other:
            other.write("event", 0, event="start")
        log = (run / "metrics.jsonl").read_bytes()
        writer.write("event", 1, event="a")
        assert (run / "metrics.jsonl").read_bytes() == log
        assert "the folder was moved or replaced" in caplog.text
        # It may have no log yet.
        (run / "metrics.jsonl").unlink()
        writer.write("event", 1, event="b")
        assert not (run / "metrics.jsonl").exists()
        own.clear()
        writer.write("event", 2, event="c")
    assert [row["event"] for row in read_metrics(run)] == ["a", "b", "c"]


def test_the_log_goes_on_in_a_copy_of_the_run_that_has_its_lock(tmp_path):
    """As when a link to the run folder leads to a copy on another disk now."""
    run, moved, locked = tmp_path / "run", tmp_path / "moved", ["at the start"]
    with MetricsWriter(run, is_own=lambda: bool(locked)) as writer:
        writer.write("train", 1, **train_row(1))
        locked.clear()
        shutil.copytree(run, moved)
        shutil.rmtree(run)
        moved.rename(run)
        writer.write("train", 2, **train_row(2))
        locked.append("at the next save")
        writer.write("train", 3, **train_row(3))
        assert not writer.lost_rows
    assert steps_of(run) == [1, 2, 3]


def test_rows_are_in_the_file_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("train", 1, **train_row(1))
    assert steps_of(tmp_path) == [1]
    writer.close()


def test_errors_name_file_and_line(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file; is .* a run"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    for line, message in (
        ("rubbish", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"step": 1}', "line 2: no text field 'kind'"),
        ('{"kind": "train", "step": 1.5}', "line 2: no whole number 'step'"),
        ('{"kind": "train", "step": 1, "wall_s": []}', r"line 2: wall_s is \[\]"),
        (f'{{"kind": "eval", "step": 1, "loss": {10**400}}}', "line 2: loss is 10000"),
        ('{"kind": "train", "step": 1, "time_s": {"steps": "x"}}', "line 2: time_s is"),
    ):
        path.write_text(f'{{"kind": "event", "step": 0}}\n{line}\n')
        with pytest.raises(ValueError, match=message) as caught:
            read_metrics(tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_terabyte_of_nothing_is_not_read(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # needs no space
    assert kinds_at(tmp_path, 1) == set()
    with pytest.raises(OSError, match="more than 1,073,741,824 bytes"):
        read_metrics(tmp_path)
    write_steps(tmp_path, [4], resume_step=3)
    words = "has more than 1,073,741,824 bytes; it is now metrics.previous.jsonl, and"
    assert words in caplog.text and steps_of(tmp_path) == [4]


def test_rows_are_checked(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="kind is 'trian'"):
            writer.write("trian", 1)
        with pytest.raises(ValueError, match="train row lacks lr, grad_norm"):
            writer.write("train", 1, loss=1.0)
        with pytest.raises(ValueError, match="a metric is a object"):
            writer.write("event", 1, event="x", other=object())
    assert read_metrics(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_warns_once_and_goes_on(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, **train_row(1))
        writer.write("train", 2, **train_row(2))
        writer.sync()
        assert writer.lost_rows == 0
    line, lost = caplog.messages
    assert "No space left" in line and "training goes on" in line
    # As where another user has the log: there is room beside it.
    assert lost.endswith("lacks 2 rows; 2 are in metrics.unwritten.jsonl")
    assert (tmp_path / "metrics.unwritten.jsonl").read_bytes().count(b"\n") == 2


def test_rows_wait_for_room_and_are_there_before_the_next_step(tmp_path, monkeypatch):
    """As while a disk is full for an hour; only so many are kept."""

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jaxlm.train.metrics.MAX_WAITING", 3)
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, **train_row(1))
        for last in (3, 8):
            with monkeypatch.context() as patch:
                patch.setattr("jaxlm.train.metrics.io.FileIO", Full)
                writer._open()
                for step in range(writer.last_train["step"] + 1, last + 1):
                    writer.write("train", step, **train_row(step))
            writer._open()
            writer.sync()
        writer.write("train", 9, **train_row(9))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 6, 7, 8, 9]
    assert [row.get("lost_rows") for row in rows[-3:]] == [None, 1, 2]


def test_later_rows_are_dropped_when_there_is_room_for_that(tmp_path, monkeypatch):
    """They would be there twice, before and after those of the run that goes on."""
    write_steps(tmp_path, [1, 2, 3, 4])

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.train.metrics.replacing", full)
        writer = MetricsWriter(tmp_path, resume_step=2)
        writer.write("train", 3, **train_row(3))
    with writer:
        writer.write("event", 4, event="there is room")
        assert writer.last_train["step"] == 3
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_rows_are_on_the_disk_before_the_step_that_they_belong_to(
    tmp_path, monkeypatch
):
    """After a power cut the run goes on from the step, and writes no row again."""
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    model = toy(context_length=256)
    config = Config(model=model, train=TrainConfig(steps=1))
    saved, state = mock.Mock(side_effect=synced.append), mock.Mock(spec=TrainState)
    with MetricsWriter(tmp_path) as writer:
        log = RunLog(config, writer, mock.Mock(spec=ProgressLine), 1)
        options = {"log": log, "is_last": True}
        loop._save(state, 1, config.train, Hooks(save=saved), **options)
        files = [path.stat().st_ino for path in (tmp_path / "metrics.jsonl", tmp_path)]
        assert synced == [*files, state]
        writer.write("event", 1, event="the last one")
    # A run that is done does not go on from there.
    assert synced == [*files, state, *files]


def test_a_row_that_fits_only_in_part_leaves_no_trace(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, **train_row(1))
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            limit = path.stat().st_size + 50
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            writer.write("train", 2, **train_row(2))
            writer.write("train", 3, **train_row(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        writer.write("train", 4, **train_row(4))
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_row_that_the_system_takes_in_parts_is_whole(tmp_path, monkeypatch):
    class Parts(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:100])

    monkeypatch.setattr("jaxlm.train.metrics.io.FileIO", Parts)
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, **train_row(1))
        assert not writer.lost_rows
    assert steps_of(tmp_path) == [1]


class Recorder:
    """A sink that keeps rows, and fails at a step."""

    def __init__(self, fails_at=None):
        self.rows, self.ends, self._fails_at = [], [], fails_at

    def write(self, row):
        if row["step"] == self._fails_at:
            raise OSError("no\nway")
        self.rows.append(row)

    def close(self, failed):
        self.ends.append(failed)


def test_sinks_get_each_row_and_one_that_fails_no_more(tmp_path, caplog):
    good, bad = Recorder(), Recorder(fails_at=2)
    with MetricsWriter(tmp_path, sinks=[bad, good]) as writer:
        for step in (1, 2, 3):
            writer.write("train", step, **train_row(step, loss=math.nan))
    assert [row["step"] for row in good.rows] == [1, 2, 3]
    assert math.isnan(good.rows[0]["loss"])
    assert [row["step"] for row in bad.rows] == [1]
    assert (good.ends, bad.ends) == ([False], [])
    (line,) = caplog.messages
    assert line == "Recorder failed and is turned off, training goes on: no way"
    assert steps_of(tmp_path) == [1, 2, 3]
    with pytest.raises(KeyError), MetricsWriter(tmp_path, sinks=[good]):
        raise KeyError
    assert good.ends == [False, True]


def small(**changes) -> ModelConfig:
    values = {
        "vocab_size": 11,
        "num_layers": 3,
        "model_dim": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "hidden_dim": 20,
        "context_length": 32,
    }
    return ModelConfig(**{**values, **changes})


def test_flops_equal_a_count_by_hand():
    # q 8*4*6, k and v 8*2*6 each, o 4*6*8; gate, up and down 8*20 each; head 8*11.
    layer = 192 + 2 * 96 + 192 + 3 * 160
    assert count_matmul_params(small()) == 3 * layer + 88
    # Each layer: scores and mix, 2 einsums * 6 * 4 heads * 6 dims * 1 to 16 keys.
    assert (
        flops_per_token(small(), 16) == 6 * (3 * layer + 88) + 3 * 2 * 6 * 4 * 6 * 8.5
    )
    assert count_matmul_params(small(tied_embeddings=False)) == 3 * layer + 88
    assert count_matmul_params(small(gated=False)) == 3 * (layer - 160) + 88


def test_flops_count_the_experts_that_a_token_goes_through():
    dense = count_matmul_params(small())
    # 2 of 7 experts, and a router of 8 x 7 in each of 3 layers.
    some = small(num_experts=7, experts_per_token=2)
    assert count_matmul_params(some) == dense + 3 * (480 + 8 * 7)


def test_flops_respect_sliding_windows():
    # local, local, global repeated over four layers: three local ones.
    local = small(num_layers=4, layer_pattern=("local", "local", "global"), window=5)
    base = 6 * count_matmul_params(local)
    assert flops_per_token(local, 16) - base == pytest.approx(
        24 * 12 * (3 * 70 / 16 + 8.5)
    )
    assert flops_per_token(local, 3) - base == pytest.approx(24 * 12 * 4 * 2)


def test_flops_need_a_vocabulary():
    with pytest.raises(ValueError, match=r"model\.vocab_size is 0"):
        flops_per_token(small(vocab_size=0), 16)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla K80", None),
        ("TPU v99", None),
    ],
)
def test_published_peaks(kind, peak):
    assert published_peak_flops(kind) == peak


def device(kind):
    return mock.Mock(spec=jax.Device, platform="gpu", device_kind=kind, process_index=0)


def test_peaks_add_up_and_an_unknown_device_has_none():
    known, unknown = device("NVIDIA A100-SXM4-80GB"), device("Tesla K80")
    assert peak_flops([known] * 4) == 4 * 312e12
    assert peak_flops([known, unknown]) is None
    assert peak_flops(jax.devices("cpu")) is None
