import numpy as np
import pytest

from jaxlm.data.packing import (
    TokenStream,
    epoch_offset,
    eval_rows,
    mix_bits,
    split_stream,
    train_rows,
)


def random_stream(random, size, documents):
    starts = random.choice(np.arange(1, size), documents - 1, replace=False)
    starts = np.sort(np.r_[0, starts]).astype(np.int64)
    tokens = random.integers(0, 50_000, size).astype(np.uint16)
    return TokenStream("test", tokens, starts, 50_000)


def slow_row(stream, first, length, segments, *, cyclic):
    """Builds one row token by token, as `train_rows` and `eval_rows` must."""
    size, starts = len(stream.tokens), set(stream.documents.tolist())
    columns = {"tokens": [], "targets": [], "positions": [], "segment_ids": []}
    weights, segment, position = [], 1, 0
    for t in range(length):
        at, after = first + t, first + t + 1
        if not cyclic and after >= size:
            values, weight = (0, 0, 0, 0), 0
        else:
            begins = segments and t > 0 and (at % size) in starts
            segment, position = (segment + 1, 0) if begins else (segment, position)
            token, target = stream.tokens[at % size], stream.tokens[after % size]
            values = (token, target, position, segment)
            across = segments and (after % size) in starts
            weight = 0 if across or after == size else 1
        for column, value in zip(columns.values(), values, strict=True):
            column.append(int(value))
        weights.append(weight)
        position += 1
    return {**columns, "loss_weights": weights}


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("documents", [1, 2, 30, 300])
def test_equals_a_slow_loop(segments, documents):
    random = np.random.default_rng(documents)
    stream = random_stream(random, 301, documents)
    for length in (1, 7, 64, 300):
        first = np.r_[0, 300, 301 - length, random.integers(0, 301, 20)]
        rows = {False: np.arange(stream.num_eval_rows(length)), True: first}
        for cyclic, values in rows.items():
            make = train_rows if cyclic else eval_rows
            batch = make(stream, values, length, segments)
            starts = values if cyclic else values * length
            for row, start in enumerate(starts.tolist()):
                want = slow_row(stream, start, length, segments, cyclic=cyclic)
                if not segments:
                    assert batch.segment_ids is None
                    want.pop("segment_ids")
                for name, column in want.items():
                    got = getattr(batch, name)
                    assert got[row].tolist() == column, (name, cyclic, start)
    assert batch.loss_weights.dtype == np.float32
    names = ["tokens", "targets", "positions"] + ["segment_ids"] * segments
    for name in names:
        assert getattr(batch, name).dtype == np.int32


def test_every_token_is_a_target_once_an_epoch():
    stream = random_stream(np.random.default_rng(0), 1003, 40)
    ids = np.arange(1003, dtype=np.uint16)
    stream = TokenStream("test", ids, stream.documents, 50_000)
    for segments in (True, False):
        seen = []
        for offset in range(10):
            first = offset + 10 * np.arange(stream.num_rows(10), dtype=np.int64)
            batch = train_rows(stream, first, 10, segments)
            assert len(np.unique(batch.tokens)) == batch.tokens.size == 1000
            targets = np.sort(batch.targets[batch.loss_weights == 1])
            assert len(np.unique(targets)) == len(targets)
            possible = np.setdiff1d(ids, stream.documents if segments else [0])
            assert set(targets) <= set(possible)
            assert len(possible) - len(targets) <= 3
            seen.append(set(possible) - set(targets))
        # The tokens left out differ by epoch.
        assert not set.intersection(*seen)


@pytest.mark.parametrize("segments", [True, False])
def test_every_held_out_token_is_a_target_once(segments):
    for size in (1, 2, 9, 10, 11, 20, 21, 999):
        documents = random_stream(np.random.default_rng(size), size + 9, 3).documents
        documents = documents[documents < size]
        stream = TokenStream("test", np.arange(size, dtype="<u2"), documents, 50_000)
        index = np.arange(stream.num_eval_rows(10) + 2, dtype=np.int64)
        batch = eval_rows(stream, index, 10, segments)
        targets = np.sort(batch.targets[batch.loss_weights == 1])
        first = documents if segments else [0]
        assert targets.tolist() == np.setdiff1d(np.arange(size), first).tolist()
        assert (batch.loss_weights[-2:] == 0).all()
        if segments:
            assert (batch.segment_ids[-2:] == 0).all()
            assert (batch.loss_weights[batch.segment_ids == 0] == 0).all()


def test_split_cuts_a_document_in_two():
    tokens = np.arange(100, dtype="<u2")
    stream = TokenStream("test", tokens, np.array([0, 40, 90, 95]), 100)
    train, held_out = split_stream(stream, 0.25)
    assert train.tokens.tolist() == list(range(75))
    assert train.documents.tolist() == [0, 40]
    assert held_out.tokens.tolist() == list(range(75, 100))
    assert held_out.documents.tolist() == [0, 15, 20]
    train, held_out = split_stream(stream, 0.1)
    assert (train.documents.tolist(), held_out.documents.tolist()) == ([0, 40], [0, 5])
    train, held_out = split_stream(stream, 0.0)
    assert (len(train.tokens), len(held_out.tokens)) == (100, 0)
    assert len(held_out.documents) == 0


def test_the_split_has_the_size_of_nanogpt():
    for size in (10, 999, 1_256_722):
        stream = TokenStream("t", np.zeros(size, "<u2"), np.zeros(1, np.int64), 1)
        assert len(split_stream(stream, 0.1)[0].tokens) == int(0.9 * size)


def test_offsets_depend_on_seed_and_epoch_only():
    offsets = np.array([[epoch_offset(s, e, 64) for e in range(200)] for s in (0, 1)])
    assert offsets.min() >= 0 and offsets.max() == 63
    assert len(np.unique(offsets[0])) > 50
    assert (offsets[0] != offsets[1]).mean() > 0.9
    # Seed 1 is not seed 0 an epoch later.
    assert (offsets[0, 1:] != offsets[1, :-1]).mean() > 0.9


def test_the_hash_never_changes():
    # The first output of splitmix64 with seed 0 (Steele et al.'s reference code).
    assert int(mix_bits(0)) == 0xE220A8397B1DCDAF
    assert int(mix_bits(2**64)) == int(mix_bits(0)) != int(mix_bits(-1))
    assert mix_bits(1, np.arange(3)).tolist() == [int(mix_bits(1, i)) for i in range(3)]


def test_an_id_outside_the_vocabulary_is_located():
    tokens = np.zeros(100, "<u2")
    tokens[80] = 7
    stream = TokenStream("file.bin", tokens, np.zeros(1, np.int64), 7)
    with pytest.raises(ValueError, match=r"file\.bin: token 80 is 7, .* 7 ids"):
        train_rows(stream, np.array([0, 95, 75]), 10)
    _, held_out = split_stream(stream, 0.5)
    with pytest.raises(ValueError, match="token 80 is 7"):
        eval_rows(held_out, np.arange(5), 10)
