"""Batches and blocks of packed and padded corpora."""

import gc
import itertools
import threading

import numpy as np
import pytest
from small import write_files

from sedd import data
from sedd.data.splits import SPLITS
from sedd.errors import UserError

# Packed


def starts_of(rows, corpus):
    """Returns the positions of rows in a training text in which each occurs once."""
    text = corpus.tokens("train").tobytes()
    return [text.index(row.astype("<u2").tobytes()) // 2 for row in rows]


def epoch_starts(corpus, block_length, seed, epoch):
    num_blocks = (corpus.num_tokens("train") - block_length + 1) // block_length
    return starts_of(data.batch(corpus, block_length, num_blocks, seed, epoch).tokens, corpus)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A corpus in which every sequence of ten tokens is unique."""
    folder = tmp_path_factory.mktemp("numbers")
    text = "".join(f"{number:04}," for number in range(1000, 2000))
    return data.prepare(write_files(folder / "text", [text]), "bytes", folder / "corpus")


def test_an_epoch_takes_each_block_once_from_a_random_offset(numbers):
    starts = [epoch_starts(numbers, 32, seed=3, epoch=epoch) for epoch in range(12)]
    for epoch in starts:
        assert 0 <= min(epoch) < 32
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 32 * len(epoch), 32))
        assert max(epoch) + 32 <= numbers.num_tokens("train")
    assert len({min(epoch) for epoch in starts}) > 6
    orders = {tuple(np.subtract(epoch, min(epoch))) for epoch in starts}
    assert len(orders) == 12 and tuple(sorted(next(iter(orders)))) not in orders
    assert epoch_starts(numbers, 32, seed=4, epoch=0) != starts[0]


def test_rows_are_independent_of_the_batch_size(numbers):
    rows = np.concatenate([data.batch(numbers, 32, 5, 7, k).tokens for k in range(80)])  # about three epochs
    assert rows.dtype == np.int32 and np.array_equal(rows[:399], data.batch(numbers, 32, 399, 7, 0).tokens)
    reopened = data.open_corpus(numbers.path)
    assert np.array_equal(data.batch(reopened, 32, 5, 7, 79).tokens, rows[-5:])


def test_batches_depend_on_all_64_bits_of_the_seed(numbers):
    seeds = (0, 1, 2**32, 2**63, 2**64 - 3, 2**64 - 1)
    assert len({data.batch(numbers, 32, 8, seed, 0).tokens.tobytes() for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("block_length", [2250, 3000, 4499, 4500])
def test_blocks_may_be_almost_as_long_as_the_text(numbers, block_length):
    assert numbers.num_tokens("train") == 4500
    starts = starts_of(data.batch(numbers, block_length, 40, 0, 0).tokens, numbers)
    assert 0 <= min(starts) and max(starts) <= 4500 - block_length
    assert len(set(starts)) > min(8, 4500 - block_length)


@pytest.mark.parametrize("start", [0, 3, 1000])
def test_the_iterator_yields_the_batches_from_its_start(numbers, start):
    iterator = data.batches(numbers, 16, 4, seed=0, start=start)
    for k, rows in enumerate(itertools.islice(iterator, 10), start):
        assert np.array_equal(rows.tokens, data.batch(numbers, 16, 4, 0, k).tokens) and rows.lengths is None


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_prefetch_thread_ends_with_the_iterator(numbers):
    gc.collect()
    iterator = data.batches(numbers, 16, 4, seed=0)
    next(iterator)
    assert len(prefetch_threads()) == 1
    iterator.close()
    assert not prefetch_threads()
    iterator = data.batches(numbers, 16, 4, seed=0)
    next(iterator)
    del iterator
    gc.collect()
    assert not prefetch_threads()


def test_an_error_in_the_thread_reaches_the_consumer(tmp_path):
    corpus = data.prepare(write_files(tmp_path / "text", ["some text " * 100]), "bytes", tmp_path / "corpus")
    iterator = data.batches(corpus, 16, 4, seed=0)
    (corpus.path / "train.tokens").unlink()
    with pytest.raises(FileNotFoundError):
        list(itertools.islice(iterator, 10))
    assert not prefetch_threads()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block_length", [1, 7, 250, 10_000])
def test_blocks_have_all_tokens_of_a_split(numbers, split, block_length):
    rows, lengths, document = data.blocks(numbers, split, block_length)
    assert rows.dtype == lengths.dtype == np.int32 and rows.shape == (len(lengths), block_length)
    valid = np.concatenate([row[:length] for row, length in zip(rows, lengths, strict=True)])
    assert np.array_equal(valid, numbers.tokens(split))
    assert np.all(lengths[:-1] == block_length) and 0 < lengths[-1] <= block_length
    assert np.all(rows[-1, lengths[-1] :] == 0) and document is None


def test_unsuitable_block_lengths_are_refused(numbers):
    data.check_block_length(numbers, "train", 4500)
    for call in (data.batch, data.batches):
        with pytest.raises(UserError, match="corpus shorter than a block: .* 4500 tokens, a block 4501"):
            call(numbers, 4501, 2, 0, 0)
    with pytest.raises(UserError, match="at least 1"):
        data.check_block_length(numbers, "test", 0)


# Padded


@pytest.fixture(scope="module", params=["ignored", "scored"])
def padded(request, tmp_path_factory):
    """A corpus of 60 documents of 7 to 66 bytes, each followed by an end-of-text id."""
    folder = tmp_path_factory.mktemp("padded")
    source = write_files(folder / "text", [f"{index:03}:" + "x" * (3 + index) for index in range(60)])
    return data.prepare(source, "bytes", folder / "corpus", mode="padded", padding=request.param)


def test_a_row_holds_one_document(padded):
    """Rows are padded with the end-of-text id; a document longer than a block takes several consecutive rows."""
    rows, lengths, document = data.blocks(padded, "train", 32)
    tokens, offsets = padded.tokens("train"), padded.offsets("train")
    assert rows.shape == (len(lengths), 32) and lengths.sum() == len(tokens) == 54 + padded.num_bytes("train")
    for number in range(len(offsets) - 1):
        own = document == number
        valid = np.concatenate([row[:length] for row, length in zip(rows[own], lengths[own], strict=True)])
        assert np.array_equal(valid, tokens[offsets[number] : offsets[number + 1]]) and valid[-1] == 256
        assert np.all(lengths[own][:-1] == 32)
    assert np.all(rows[np.arange(32) >= lengths[:, None]] == 256)


def test_an_epoch_takes_each_row_once(padded):
    rows, lengths, _ = data.blocks(padded, "train", 32)
    count = len(rows)
    epochs = [data.batch(padded, 32, count, 5, k) for k in range(2)]
    for epoch in epochs:
        assert sorted(map(bytes, epoch.tokens)) == sorted(map(bytes, rows))
        if padded.layout.masks_padding:
            expected = sorted(zip(map(bytes, rows), lengths))
            assert sorted(zip(map(bytes, epoch.tokens), epoch.lengths)) == expected
        else:
            assert epoch.lengths is None
    assert not np.array_equal(epochs[0].tokens, epochs[1].tokens)
    parts = [data.batch(padded, 32, 7, 5, k).tokens for k in range(9)]
    assert np.array_equal(np.concatenate(parts)[:count], epochs[0].tokens[:63])


def test_row_lengths_counts_the_training_rows(padded):
    _, lengths, _ = data.blocks(padded, "train", 32)
    counts = data.row_lengths(padded, 32)
    assert len(counts) == 33 and counts[0] == 0 and sum(counts) == len(lengths)
    assert all(counts[length] == (lengths == length).sum() for length in range(33))


def test_a_block_may_be_longer_than_a_padded_text(padded):
    assert data.batch(padded, 9999, 2, 0, 0).tokens.shape == (2, 9999)


def test_the_layout_is_part_of_the_hash(padded, tmp_path):
    """A run therefore cannot resume with a corpus of a different layout."""
    others = [dict(mode="padded", padding=padding) for padding in ("ignored", "scored")] + [dict()]
    corpora = [
        data.prepare(padded.meta["source"], "bytes", tmp_path / str(number), **other)
        for number, other in enumerate(others)
    ]
    assert len({corpus.hash for corpus in corpora}) == 3 and padded.hash in {corpus.hash for corpus in corpora}


def test_padded_names_have_no_newline(tmp_path):
    corpus = data.prepare("builtin:names", "characters", tmp_path / "corpus", mode="padded")
    assert corpus.tokenizer.end_of_text == corpus.vocab_size - 1
    assert "\n" not in corpus.tokenizer.decode(corpus.tokens("test"))
