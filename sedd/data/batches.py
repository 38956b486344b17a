"""Training batches, each a pure function of (corpus, block length, batch size, seed, k), and blocks for evaluation.

The step number is the only state of the data: a run resumes at batch k without a record of the earlier batches.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sedd.data.corpus import Corpus
from sedd.data.layout import cut, padded_rows
from sedd.errors import UserError
from sedd.seeds import philox

PREFETCH = 4  # number of batches read ahead of the consumer


class Batch(NamedTuple):
    """A training batch. lengths: number of valid tokens of each row; None where all tokens are valid."""

    tokens: np.ndarray  # Int32[B L]
    lengths: np.ndarray | None  # Int32[B]


def batch(
    corpus: Corpus, block_length: int, batch_size: int, seed: int, k: int, rows: np.ndarray | None = None
) -> Batch:
    """Returns training batch k, or only the requested rows of it.

    rows: Int[R], indices in [0, B); None for all. Row i of batch k is example k B + i of an endless stream of epochs; a
    batch may span epochs. packed: each epoch draws an offset, cuts the training text into consecutive blocks from there
    and takes each block once in a random order, so that it omits some tokens at both ends of the text. padded: each
    epoch takes each row of each document once in a random order.

    UserError if the training text is shorter than a block, or an id is outside of the vocabulary.
    """
    check_block_length(corpus, "train", block_length)
    examples = (k * batch_size + (np.arange(batch_size) if rows is None else rows)).tolist()
    tokens = corpus.tokens("train")
    if corpus.layout.padded:
        starts, lengths, _ = _rows(corpus, "train", block_length)
        index = np.array([_row_index(len(starts), seed, example) for example in examples])
        padded = _gather_rows(tokens, starts[index], lengths[index], block_length, _padding_id(corpus))
        return Batch(corpus.checked(padded), lengths[index] if corpus.layout.masks_padding else None)
    starts = np.array([_block_start(len(tokens), block_length, seed, example) for example in examples])
    return Batch(corpus.checked(tokens[starts[:, None] + np.arange(block_length)]).astype(np.int32), None)


def batches(
    corpus: Corpus, block_length: int, batch_size: int, seed: int, start: int = 0, rows: np.ndarray | None = None
) -> Generator[Batch, None, None]:
    """Yields training batches `start`, `start` + 1, ... without end, read ahead by one thread.

    rows: as in `batch`. UserError if the training text is shorter than a block.
    """
    check_block_length(corpus, "train", block_length)
    return _read_ahead(functools.partial(batch, corpus, block_length, batch_size, seed, rows=rows), start)


def blocks(corpus: Corpus, split: str, block_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns all tokens of a split: packed in consecutive blocks, the last padded with 0; padded by document.

    The tokens, Int32[N L]; the number of valid ones of each row, end-of-text ids included, Int32[N]; and the index of
    the document of each row, Int64[N], None where rows span documents. UserError if an id is outside of the vocabulary.
    """
    tokens = corpus.checked(corpus.tokens(split))
    if corpus.layout.padded:
        starts, lengths, document = _rows(corpus, split, block_length)
        return _gather_rows(tokens, starts, lengths, block_length, _padding_id(corpus)), lengths, document
    return (*cut(tokens, block_length), None)


def row_lengths(corpus: Corpus, block_length: int) -> tuple[int, ...]:
    """Returns the numbers of training rows of a padded corpus with 0, 1, ..., L tokens."""
    _, lengths, _ = _rows(corpus, "train", block_length)
    return tuple(np.bincount(lengths, minlength=block_length + 1).tolist())


def check_block_length(corpus: Corpus, split: str, block_length: int) -> None:
    """UserError if a split has fewer tokens than one block, or the block length is below 1."""
    if block_length < 1:
        raise UserError(f"a block of {block_length} tokens is empty; choose a block length of at least 1")
    num_tokens = corpus.num_tokens(split)
    if block_length > num_tokens and not corpus.layout.padded:
        raise UserError(
            f"corpus shorter than a block: the {split} split of {corpus.path} has {num_tokens} tokens, a block "
            f"{block_length}; choose a block length of {num_tokens} or less, or prepare more text"
        )


def _padding_id(corpus: Corpus) -> int:
    """Returns the id that pads the rows of a padded corpus: its end-of-text id."""
    padding = corpus.tokenizer.end_of_text
    assert padding is not None  # `prepare` gives the tokenizer of every padded corpus one
    return padding


def _gather_rows(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, block_length: int, padding: int
) -> np.ndarray:
    """Returns Int32[N L]: row i has lengths[i] tokens from starts[i] on, then padding."""
    position = np.arange(block_length)
    index = np.minimum(starts[:, None] + position, len(tokens) - 1)
    return np.where(position < lengths[:, None], tokens[index], padding).astype(np.int32)


def _rows(corpus: Corpus, split: str, block_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _cached_rows(corpus.path / f"{split}.offsets", corpus.hash, block_length)


@functools.lru_cache(maxsize=4)
def _cached_rows(file: Path, corpus_hash: str, block_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows of a padded split; cached, since each batch needs them. The hash is part of the cache's key."""
    return padded_rows(np.fromfile(file, "<i8"), block_length)


def _row_index(num_rows: int, seed: int, example: int) -> int:
    """Returns the index of the row of a padded corpus that an example is."""
    epoch, index = divmod(example, num_rows)
    return _row_order(num_rows, seed, epoch)[index]


@functools.lru_cache(maxsize=2)
def _row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the rows in an epoch of a padded corpus, Int64[num_rows]; cached."""
    return philox(seed, epoch).permutation(num_rows)


def _block_start(num_tokens: int, block_length: int, seed: int, example: int) -> int:
    """Returns the index of the first training token of an example."""
    num_blocks = max(1, (num_tokens - block_length + 1) // block_length)  # fits after every offset
    epoch, index = divmod(example, num_blocks)
    offset, order = _epoch(num_tokens, num_blocks, block_length, seed, epoch)
    return offset + block_length * order[index]


@functools.lru_cache(maxsize=2)
def _epoch(num_tokens: int, num_blocks: int, block_length: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """Returns the offset of an epoch and the order of its blocks, Int64[num_blocks]; cached."""
    random = philox(seed, epoch)
    max_offset = min(block_length - 1, num_tokens - num_blocks * block_length)
    return int(random.integers(max_offset, endpoint=True)), random.permutation(num_blocks)


def _read_ahead(read: Callable[[int], Batch], start: int) -> Generator[Batch, None, None]:
    """Yields read(start), read(start + 1), ..., of which a thread reads `PREFETCH` ahead; it ends with the iterator."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        pending = deque(pool.submit(read, k) for k in range(start, start + PREFETCH))
        while True:
            ready = pending.popleft().result()
            pending.append(pool.submit(read, start + PREFETCH))
            start += 1
            yield ready
    finally:
        pool.shutdown(cancel_futures=True)
