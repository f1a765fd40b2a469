import dataclasses
import gc
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from model_case import small

from jaxlm.commands.training_run.hooks import make_hooks
from jaxlm.config import Config, DataConfig, TrainConfig
from jaxlm.data import loader
from jaxlm.data.loader import batches, open_dataset, place
from jaxlm.data.order import TABLE_ROWS, RowOrder, interleave, share_units
from jaxlm.sharding.mesh import make_mesh


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module-cache")
    config = DataConfig(sequence_length=32, cache_dir=str(folder))
    return open_dataset(config, seed=3)


def write(path, count, character):
    path.write_text(character * count)
    return str(path)


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_bundled_text(dataset, shakespeare):
    assert dataset.num_train_tokens == int(0.9 * 1_256_722)
    assert dataset.tokenizer.vocab_size == 78
    batch = dataset.train_batch(0, 4)
    for row, targets in zip(batch.tokens, batch.targets, strict=True):
        text = dataset.tokenizer.decode(np.r_[row, targets[-1:]])
        assert text in shakespeare[: dataset.num_train_tokens]
    assert dataset.eval_bytes_per_token == 1.0
    held_out = list(dataset.eval_batches(64))
    assert len(held_out) == dataset.num_eval_batches(64)
    assert {b.tokens.shape for b in held_out} == {(64, 32)}
    assert sum(int(b.loss_weights.sum()) for b in held_out) == 125_673 - 1
    text = "".join(
        dataset.tokenizer.decode(b.tokens[b.segment_ids > 0]) for b in held_out
    )
    assert text == shakespeare[dataset.num_train_tokens : -1]


@pytest.mark.parametrize("num_rows", [1, 5, TABLE_ROWS, TABLE_ROWS + 1])
def test_every_row_once_an_epoch(num_rows):
    order = RowOrder([num_rows], [1.0], seed=0)
    count = min(num_rows, 20_000)
    epochs = []
    for epoch in range(3):
        index = np.arange(num_rows)[:count] + epoch * num_rows
        source, epoch_of, row = order.rows(index)
        assert set(source) == {0} and set(epoch_of) == {epoch}
        assert sorted(row) == list(range(num_rows))
        epochs.append(row.tolist())
    if num_rows > 1:
        assert epochs[0] != epochs[1] != epochs[2]
        other = RowOrder([num_rows], [1.0], seed=1)
        # Seed 1 is neither seed 0 nor seed 0 an epoch later.
        shuffled = other.rows(np.arange(num_rows))[2].tolist()
        assert num_rows < 10 or shuffled not in epochs


def test_random_access_equals_one_index_at_a_time(dataset):
    whole = dataset.order.rows(np.arange(100_000, 100_064))
    single = [dataset.order.rows(np.array([i])) for i in range(100_000, 100_064)]
    for values, ones in zip(whole, zip(*single, strict=True), strict=True):
        assert values.tolist() == np.concatenate(ones).tolist()


def test_processes_build_their_rows_of_the_same_batch(dataset):
    for step in (0, 7, 5000):
        whole = dataset.train_batch(step, 8)
        for count in (2, 4, 8):
            rows = [slice(i, i + 8 // count) for i in range(0, 8, 8 // count)]
            parts = [dataset.train_batch(step, 8, part) for part in rows]
            assert same(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole)
    last = dataset.num_eval_batches(64) - 1
    whole = dataset.eval_batch(last, 64)
    parts = [dataset.eval_batch(last, 64, slice(i, i + 16)) for i in range(0, 64, 16)]
    assert same(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole)
    assert dataset.train_batch(0, 8, slice(3, 3)).tokens.shape == (0, 32)


def test_prefetch_changes_nothing(dataset):
    want = [dataset.train_batch(step, 4) for step in range(5, 15)]
    for prefetch in (0, 1, 4):
        stream = batches(dataset, 4, start_step=5, prefetch=prefetch)
        for batch in want:
            got = next(stream)
            assert isinstance(got.tokens, jax.Array)
            assert same(got, batch)
        stream.close()


def test_steps_may_have_other_batches_than_those_of_their_number(dataset):
    for prefetch in (0, 2):
        steps = batches(dataset, 4, 1, None, prefetch, lambda step: 10 * step)
        for number in (20, 30):
            assert same(next(steps), dataset.train_batch(number - 1, 4))
        steps.close()


def test_batches_on_a_mesh(dataset):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = NamedSharding(mesh, jax.P("data"))
    size = 4 * len(jax.devices())
    stream = batches(dataset, size, sharding=sharding)
    got = next(stream)
    assert same(got, dataset.train_batch(0, size))
    assert got.tokens.sharding.is_equivalent_to(sharding, 2)
    stream.close()


class TwoProcesses(NamedSharding):
    """A sharding over two devices, of which this process has the second."""

    def addressable_devices_indices_map(self, shape):
        return {"second": (slice(shape[0] // 2, None), slice(None))}


def test_a_process_builds_only_its_rows(dataset, monkeypatch):
    requested = []
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = TwoProcesses(mesh, jax.P("data"))

    def assemble(shape, _, part):
        assert shape == (8, 32)
        return jax.numpy.asarray(part((slice(4, 8), slice(None))))

    def build(rows):
        requested.append(rows)
        return dataset.train_batch(0, 8, rows)

    monkeypatch.setattr(jax, "make_array_from_callback", assemble)
    got = place(build, (8, 32), sharding)
    assert requested == [slice(4, 8)]
    assert same(got, jax.tree.map(lambda x: x[4:], dataset.train_batch(0, 8)))


def worker_threads():
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_the_thread_ends_with_the_iterator(dataset):
    stream = batches(dataset, 4)
    next(stream)
    assert len(worker_threads()) == 1
    stream.close()
    assert not worker_threads()
    stream = batches(dataset, 4)
    next(stream)
    del stream
    gc.collect()
    assert not worker_threads()


def test_errors_reach_the_consumer_in_order(dataset, monkeypatch):
    real = loader.train_rows

    def fails(stream, first, length, segment_attention):
        fails.calls += 1
        if fails.calls == 3:
            raise ValueError("the third batch is broken")
        return real(stream, first, length, segment_attention)

    monkeypatch.setattr(loader, "train_rows", fails)
    for prefetch in (0, 2):
        fails.calls = 0
        stream = batches(dataset, 4, prefetch=prefetch)
        next(stream), next(stream)
        with pytest.raises(ValueError, match="third batch"):
            next(stream)
    assert not worker_threads()


@pytest.mark.parametrize(
    "weights", [(0.7, 0.3), (1.0, 0.0, 2.0), (5.0,), (1e-9, 1.0, 0.5)]
)
def test_shares_of_a_mixture(weights):
    units = share_units(list(weights))
    source, key = interleave(np.arange(100_000), units)
    for number, weight in enumerate(weights):
        mine = key[source == number]
        assert mine.tolist() == list(range(len(mine)))
        share = 100_000 * weight / sum(weights)
        assert abs(len(mine) - share) <= 2
        # Evenly spread: any 100 consecutive rows have the right share.
        counts = np.bincount(np.flatnonzero(source == number) // 100, minlength=1000)
        assert abs(counts - share / 1000).max() <= 2


def test_mixtures(tmp_path):
    paths = (write(tmp_path / "a.txt", 3000, "a"), write(tmp_path / "b.txt", 1000, "b"))
    options = {"path": paths, "sequence_length": 10, "holdout_fraction": 0.1}

    def share_of_b(**more):
        dataset = open_dataset(DataConfig(**options, **more), seed=0)
        rows = np.concatenate([dataset.train_batch(s, 8).tokens for s in range(50)])
        # Each row comes from one source.
        assert (rows == rows[:, :1]).all()
        return rows.mean()

    assert share_of_b() == pytest.approx(0.25, abs=0.01)
    assert share_of_b(weights=(1.0, 4.0)) == pytest.approx(0.8, abs=0.01)
    assert share_of_b(weights=(1.0, 0.0)) == 0.0
    dataset = open_dataset(DataConfig(**options), seed=0)
    held_out = list(dataset.eval_batches(8))
    assert sum(b.loss_weights.sum() for b in held_out) == (300 - 1) + (100 - 1)


def test_text_that_is_read_twice_is_told(tmp_path, caplog):
    """A file of two entries, or a copy of one."""
    one, two = (write(tmp_path / f"{c}.txt", 500, c) for c in "ab")
    both = str(tmp_path / "*.txt")
    (tmp_path / "copy").mkdir()
    copy = write(tmp_path / "copy" / "of-a.txt", 500, "a")
    all_three = str(tmp_path / "**" / "*.txt")
    cases = [((one, two), 0), ((one, one), 0), ((both, one), 1), ((one, copy), 0)]
    cases += [((all_three,), 1), ((both, copy), 1)]
    for path, times in cases:
        caplog.clear()
        config = DataConfig(
            path=path, tokenizer="bytes", sequence_length=16, cache_dir=str(tmp_path)
        )
        open_dataset(config, seed=0)
        assert caplog.text.count("so the held-out loss is too low") == times


def test_fingerprint(tmp_path):
    paths = (write(tmp_path / "a.txt", 3000, "ab"), write(tmp_path / "b.txt", 999, "b"))

    def fingerprint(seed=0, **options):
        config = DataConfig(**{"path": paths, "sequence_length": 10, **options})
        return open_dataset(config, seed=seed).fingerprint

    first = fingerprint()
    assert fingerprint() == fingerprint(prefetch=0, workers=1) == first
    others = [
        fingerprint(seed=1),
        fingerprint(path=paths[::-1]),
        fingerprint(path=paths[:1]),
        fingerprint(weights=(0.5, 0.5)),
        fingerprint(sequence_length=11),
        fingerprint(holdout_fraction=0.2),
        fingerprint(segment_attention=False),
        fingerprint(tokenizer="bytes"),
    ]
    (tmp_path / "a.txt").write_text("ab" * 2999 + "ba")
    others.append(fingerprint())
    assert len({first, *others}) == len(others) + 1


def test_documents_are_segments(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcd"}\n' * 100)
    options = {"path": (str(path),), "sequence_length": 7, "tokenizer": "bytes"}
    batch = open_dataset(DataConfig(**options), seed=0).train_batch(0, 16)
    assert batch.positions.max() == 4
    # The end of a document is predicted, the token after it is not.
    assert (batch.loss_weights[batch.tokens == 256] == 0).all()
    assert (batch.loss_weights[batch.targets == 256] == 1).all()
    config = DataConfig(**options, segment_attention=False)
    batch = open_dataset(config, seed=0).train_batch(0, 16)
    assert batch.segment_ids is None and (batch.positions == np.arange(7)).all()


def test_bytes_per_token(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 1000)
    config = DataConfig(path=(str(tmp_path / "a.txt"),), sequence_length=10)
    assert open_dataset(config, seed=0).eval_bytes_per_token == 2.0
    config = DataConfig(path=config.path, sequence_length=10, holdout_fraction=0.0)
    dataset = open_dataset(config, seed=0)
    assert list(dataset.eval_batches(4)) == []
    with pytest.raises(ValueError, match=r"data\.holdout_fraction"):
        _ = dataset.eval_bytes_per_token


def test_held_out_tokens_without_bytes(tmp_path):
    """Of two tokens the second may end a document."""
    path = write(tmp_path / "a.txt", 500, "a")
    data = DataConfig(
        path=(path,), tokenizer="bytes", sequence_length=16, holdout_fraction=0.003
    )
    config = Config(
        model=small(vocab_size=257), data=data, train=TrainConfig(sample_every=0)
    )
    dataset = open_dataset(data, seed=0)
    assert dataset.eval_bytes_per_token == 0
    with jax.set_mesh(make_mesh(config.mesh)):
        hooks = make_hooks(config, dataset, None)
    assert hooks.held_out is not None and hooks.bytes_per_token is None


def test_a_source_shorter_than_a_row(tmp_path):
    path = write(tmp_path / "short.txt", 100, "a")
    message = (
        r"short\.txt: 90 training tokens .*10% .*length 90 \+ 1; add text or lower"
    )
    with pytest.raises(ValueError, match=message):
        open_dataset(DataConfig(path=(path,), sequence_length=90), seed=0)
    dataset = open_dataset(DataConfig(path=(path,), sequence_length=89), seed=0)
    assert dataset.train_batch(0, 4).tokens.shape == (4, 89)


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_a_tokenizer_is_trained_once(tmp_path, monkeypatch, shakespeare, kind):
    (tmp_path / "a.txt").write_text(shakespeare[:50_000])
    options = {"tokenizer": kind, "tokenizer_vocab_size": 400}
    config = DataConfig(path=(str(tmp_path),), sequence_length=16, **options)
    first = open_dataset(config, seed=0)
    monkeypatch.setattr(loader, "build_tokenizer", None)
    again = open_dataset(config, seed=0)
    assert again.fingerprint == first.fingerprint
    assert first.eval_bytes_per_token > 1.3
    text = first.tokenizer.decode(np.asarray(first.held_out[0].tokens[:-1]))
    assert shakespeare[:50_000].endswith(text)
    other = dataclasses.replace(config, tokenizer_vocab_size=399)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        open_dataset(other, seed=0)


def test_a_given_tokenizer_is_used(tmp_path, dataset):
    path = write(tmp_path / "a.txt", 500, "ab")
    config = DataConfig(path=(path,), sequence_length=16)
    got = open_dataset(config, dataset.tokenizer, seed=0)
    assert got.tokenizer is dataset.tokenizer
    (tmp_path / "a.txt").write_text("ab€" * 300)
    with pytest.raises(
        ValueError, match=r"a\.txt: character '€' \(U\+20AC\) at offset 2"
    ):
        open_dataset(config, dataset.tokenizer, seed=0)
