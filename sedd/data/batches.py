"""Training batches, each a pure function of (corpus, block length, batch size, seed, k), and blocks for evaluation.

The step number is the whole state of the data: a run resumes at batch k without a record of what it has seen.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sedd.data.corpus import Corpus
from sedd.data.layout import cut, padded_rows
from sedd.data.splits import philox
from sedd.errors import UserError

PREFETCH = 4  # batches read ahead of the consumer


class Batch(NamedTuple):
    """Rows of training. lengths: how many tokens of each count; None where all do."""

    tokens: np.ndarray  # Int32[B L]
    lengths: np.ndarray | None  # Int32[B]


class Blocks(NamedTuple):
    """A split laid out for evaluation, nothing dropped."""

    tokens: np.ndarray  # Int32[N L]
    lengths: np.ndarray  # Int32[N], the tokens of each row that are text, end-of-text ids included
    document: np.ndarray | None  # Int64[N], the document of each row; None where rows span documents


def batch(
    corpus: Corpus, block_length: int, batch_size: int, seed: int, k: int, rows: np.ndarray | None = None
) -> Batch:
    """Batch k of training, or the rows of it that are told, Int[R].

    Its rows are the examples k B, ..., k B + B - 1 of an endless stream of epochs. A batch may span epochs.
    packed: an epoch takes each of its blocks once, in an order of its own; the blocks follow one another from an offset
    of its own. So some tokens at either end of the training text are left out of an epoch, but not of training.
    padded: an epoch takes each row of each document once, in an order of its own.

    Raises:
      UserError: the training text is shorter than a block, or an id is outside of the vocabulary.
    """
    check_block_length(corpus, "train", block_length)
    examples = (k * batch_size + (np.arange(batch_size) if rows is None else rows)).tolist()
    tokens = corpus.tokens("train")
    if corpus.layout.padded:
        starts, lengths, _ = _rows(corpus, "train", block_length)
        at = np.array([_row_index(len(starts), seed, example) for example in examples])
        filled = _filled(tokens, starts[at], lengths[at], block_length, corpus.tokenizer.end_of_text)
        return Batch(corpus.checked(filled), lengths[at] if corpus.layout.masks_padding else None)
    starts = np.array([_block_start(len(tokens), block_length, seed, example) for example in examples])
    return Batch(corpus.checked(tokens[starts[:, None] + np.arange(block_length)]).astype(np.int32), None)


def batches(
    corpus: Corpus, block_length: int, batch_size: int, seed: int, start: int = 0, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Training batches `start`, `start` + 1, ... without end, read ahead by one thread. rows: of `batch`.

    Raises:
      UserError: the training text is shorter than a block.
    """
    check_block_length(corpus, "train", block_length)
    return _read_ahead(functools.partial(batch, corpus, block_length, batch_size, seed, rows=rows), start)


def blocks(corpus: Corpus, split: str, block_length: int) -> Blocks:
    """The whole split: packed in consecutive blocks, the last filled up with zeros; padded document by document.

    Raises:
      UserError: an id is outside of the vocabulary.
    """
    tokens = corpus.checked(corpus.tokens(split))
    if corpus.layout.padded:
        starts, lengths, document = _rows(corpus, split, block_length)
        return Blocks(_filled(tokens, starts, lengths, block_length, corpus.tokenizer.end_of_text), lengths, document)
    return Blocks(*cut(tokens, block_length), None)


def row_lengths(corpus: Corpus, block_length: int) -> tuple[int, ...]:
    """How many training rows of a padded corpus have 0, 1, ..., L tokens."""
    _, lengths, _ = _rows(corpus, "train", block_length)
    return tuple(np.bincount(lengths, minlength=block_length + 1).tolist())


def check_block_length(corpus: Corpus, split: str, block_length: int) -> None:
    """Raises a UserError where a split does not fill one block."""
    if block_length < 1:
        raise UserError(f"a block of {block_length} tokens holds nothing; choose a block length of at least 1")
    num_tokens = corpus.num_tokens(split)
    if block_length > num_tokens and not corpus.layout.padded:
        raise UserError(
            f"corpus shorter than a block: the {split} split of {corpus.path} has {num_tokens} tokens, a block "
            f"{block_length}; choose a block length of {num_tokens} or less, or prepare more text"
        )


def _filled(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, block_length: int, padding: int) -> np.ndarray:
    """Rows of so many tokens from where they begin, filled up. Int32[N L]."""
    within = np.arange(block_length)
    at = np.minimum(starts[:, None] + within, len(tokens) - 1)
    return np.where(within < lengths[:, None], tokens[at], padding).astype(np.int32)


def _rows(corpus: Corpus, split: str, block_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _kept_rows(corpus.path / f"{split}.offsets", corpus.hash, block_length)


@functools.lru_cache(maxsize=4)
def _kept_rows(file: Path, corpus_hash: str, block_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a padded split; kept, since a batch takes but a few. The hash tells a corpus from the next one."""
    return padded_rows(np.fromfile(file, "<i8"), block_length)


def _row_index(num_rows: int, seed: int, example: int) -> int:
    """Which row of a padded corpus an example is."""
    epoch, index = divmod(example, num_rows)
    return _order_of_rows(num_rows, seed, epoch)[index]


@functools.lru_cache(maxsize=2)
def _order_of_rows(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch of a padded corpus, Int64[num_rows]; kept likewise."""
    return philox(seed, epoch).permutation(num_rows)


def _block_start(num_tokens: int, block_length: int, seed: int, example: int) -> int:
    """Where in the training tokens an example begins."""
    num_blocks = max(1, (num_tokens - block_length + 1) // block_length)  # fits behind every offset
    epoch, index = divmod(example, num_blocks)
    offset, order = _epoch(num_tokens, num_blocks, block_length, seed, epoch)
    return offset + block_length * order[index]


@functools.lru_cache(maxsize=2)
def _epoch(num_tokens: int, num_blocks: int, block_length: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """The offset of an epoch and the order of its blocks, Int64[num_blocks]; kept, since a batch takes but a few."""
    random = philox(seed, epoch)
    largest = min(block_length - 1, num_tokens - num_blocks * block_length)
    return random.integers(largest, endpoint=True), random.permutation(num_blocks)


def _read_ahead(read: Callable[[int], Batch], start: int) -> Iterator[Batch]:
    """read(start), read(start + 1), ... with `PREFETCH` of them under way in a thread, which ends with the iterator."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        waiting = deque(pool.submit(read, k) for k in range(start, start + PREFETCH))
        while True:
            ready = waiting.popleft().result()
            waiting.append(pool.submit(read, start + PREFETCH))
            start += 1
            yield ready
    finally:
        pool.shutdown(cancel_futures=True)
