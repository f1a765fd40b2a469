"""A damaged `metrics.jsonl`: what is damaged is seen, set aside, and stops nothing."""

import contextlib
import errno
import json
import random
import shutil

import pytest

from jaxlm.train.metrics import DAMAGED, FILE_NAME, MetricsWriter, read_metrics

STEPS = 8


def write_row(writer, step):
    writer.write(
        "train",
        step,
        **{
            "loss": 1.0 / step,
            "lr": 1e-3,
            "grad_norm": 2.0 * step,
            "tokens": 64 * step,
        },
        **{"tokens_per_s": None, "mfu": None, "data_wait_s": 0.0, "step_s": 0.1},
        wall_s=0.1 * step,
    )


@pytest.fixture
def log(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, STEPS + 1):
            write_row(writer, step)
    return tmp_path / FILE_NAME


def test_every_flip_of_a_bit_is_seen_and_costs_only_its_row(log, caplog):
    whole, rows = log.read_bytes(), read_metrics(log.parent)
    rng = random.Random(0)
    for _ in range(80):
        caplog.clear()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole) - 1)] ^= 1 << rng.randrange(8)
        log.write_bytes(damaged)
        with MetricsWriter(log.parent, resume_step=STEPS) as writer:
            write_row(writer, STEPS + 1)
        after = read_metrics(log.parent)
        kept = [row for row in after[:-1] if row in rows]
        # A flip may also turn a character into a line end, or that into a character.
        assert kept == after[:-1] and len(kept) >= STEPS - 2
        assert after[-1]["step"] == STEPS + 1
        if "\n" not in chr(damaged[-1]):
            continue
        (line,) = caplog.messages
        assert f"moved to {DAMAGED}" in line and "\n" not in line and len(line) < 300
        assert (log.parent / DAMAGED).stat().st_size > 0
        (log.parent / DAMAGED).unlink()


def test_rows_without_checksums_are_still_read(log):
    """Of earlier versions; without them, most flips of digits are not seen."""
    rows = read_metrics(log.parent)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(log.parent) == rows
    with MetricsWriter(log.parent, resume_step=STEPS) as writer:
        assert writer.last_train == rows[-1]
        write_row(writer, STEPS + 1)
    assert [row["step"] for row in read_metrics(log.parent)] == [*range(1, STEPS + 2)]
    assert not (log.parent / DAMAGED).exists()
    log.write_text(log.read_text().replace('"loss": 0.5,', '"loss": 0.7,'))
    assert read_metrics(log.parent)[1]["loss"] == 0.7
    # After a row with a checksum, one without is damaged too.
    first, *rest = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + rest[-1] + rest[0])
    with pytest.raises(ValueError, match=r"line 3: it is damaged \(it has no checksum"):
        read_metrics(log.parent)


@pytest.mark.parametrize("fault", ["deleted", "folder deleted", "a folder is there"])
def test_rows_wait_while_a_log_has_disappeared(log, fault, caplog):
    with MetricsWriter(log.parent, resume_step=STEPS) as writer:
        waits = fault != "deleted"
        if fault == "folder deleted":
            shutil.rmtree(log.parent)
        else:
            log.unlink()
        if fault == "a folder is there":
            log.mkdir()
        write_row(writer, 9)
        write_row(writer, 10)
        assert len(caplog.messages) == waits
        if waits:
            shutil.rmtree(log, ignore_errors=True)
            log.parent.mkdir(exist_ok=True)
        write_row(writer, 11)
    assert [row["step"] for row in read_metrics(log.parent)] == [9, 10, 11]


def test_a_folder_in_its_place_at_the_start_is_one_line(tmp_path, caplog):
    (tmp_path / FILE_NAME / "x").mkdir(parents=True)
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        write_row(writer, 4)
    line, lost = caplog.messages
    assert "Is a directory): training goes on, and its rows wait until it can" in line
    assert lost.endswith("lacks 1 rows; 1 are in metrics.unwritten.jsonl")


def test_damaged_lines_are_set_aside_once_and_not_with_each_row(log, monkeypatch):
    """While the disk is full, and the log cannot be written without them."""
    log.write_bytes(log.read_bytes().replace(b"loss", b"lxss", 1))

    @contextlib.contextmanager
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    before = set(log.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.train.metrics.replacing", full)
        writer = MetricsWriter(log.parent, resume_step=STEPS)
        write_row(writer, 9)
        write_row(writer, 10)
        assert set(log.parent.iterdir()) == before
    with writer:
        write_row(writer, 11)
    (new,) = set(log.parent.iterdir()) - before
    assert new.name == "metrics.damaged.jsonl"
    assert [row["step"] for row in read_metrics(log.parent)][-3:] == [9, 10, 11]
