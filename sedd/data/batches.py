"""Training batches, each a pure function of (corpus, block length, batch size, seed, k), and blocks for evaluation.

The step number is the whole state of the data: a run resumes at batch k without a record of what it has seen.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sedd.data.corpus import Corpus
from sedd.data.splits import philox
from sedd.errors import UserError

PREFETCH = 4  # batches read ahead of the consumer


def batch(corpus: Corpus, block_length: int, batch_size: int, seed: int, k: int) -> np.ndarray:
    """Batch k of training, Int32[B L].

    Its rows are the examples k B, ..., k B + B - 1 of an endless stream of epochs. An epoch takes each of its blocks
    once, in an order of its own; the blocks follow one another from an offset of its own. So some tokens at either end
    of the training text are left out of an epoch, but not of training. A batch may span epochs.

    Raises:
      UserError: the training text is shorter than a block.
    """
    check_block_length(corpus, "train", block_length)
    tokens = corpus.tokens("train")
    examples = range(k * batch_size, (k + 1) * batch_size)
    starts = np.array([_block_start(len(tokens), block_length, seed, example) for example in examples])
    return tokens[starts[:, None] + np.arange(block_length)].astype(np.int32)


def batches(corpus: Corpus, block_length: int, batch_size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Training batches `start`, `start` + 1, ... without end, Int32[B L], read ahead by one thread.

    Raises:
      UserError: the training text is shorter than a block.
    """
    check_block_length(corpus, "train", block_length)
    return _read_ahead(functools.partial(batch, corpus, block_length, batch_size, seed), start)


def blocks(corpus: Corpus, split: str, block_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole split in consecutive blocks, for evaluation.

    Returns:
      The tokens, Int32[N L], the last row padded with zeros, and the true lengths of the rows, Int32[N].
    """
    tokens = corpus.tokens(split)
    num_blocks = -(-len(tokens) // block_length)
    rows = np.zeros(num_blocks * block_length, np.int32)
    rows[: len(tokens)] = tokens
    lengths = np.full(num_blocks, block_length, np.int32)
    lengths[-1] = len(tokens) - (num_blocks - 1) * block_length
    return rows.reshape(num_blocks, block_length), lengths


def check_block_length(corpus: Corpus, split: str, block_length: int) -> None:
    """Raises a UserError where a split does not fill one block."""
    if block_length < 1:
        raise UserError(f"a block of {block_length} tokens holds nothing; choose a block length of at least 1")
    num_tokens = corpus.num_tokens(split)
    if block_length > num_tokens:
        raise UserError(
            f"corpus shorter than a block: the {split} split of {corpus.path} has {num_tokens} tokens, a block "
            f"{block_length}; choose a block length of {num_tokens} or less, or prepare more text"
        )


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


def _read_ahead(read: Callable[[int], np.ndarray], start: int) -> Iterator[np.ndarray]:
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
