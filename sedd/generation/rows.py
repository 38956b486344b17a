"""Rows of given and free tokens, of any lengths: what prompts, answers and the sampling loop have in common."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sedd.data.layout import Layout
from sedd.errors import UserError
from sedd.trained import Trained

MAX_TOKENS = 2**28  # per call, over all rows: they take about 10 GB of memory


class Row(NamedTuple):
    """One row of L tokens; L differs between rows."""

    tokens: np.ndarray  # Int32[L]
    free: np.ndarray  # Bool[L], True at positions to fill in or to score


class Rows(NamedTuple):
    """N rows in arrays of one shape. Masks that are not free are unknown, and stay masked."""

    tokens: np.ndarray  # Int32[N L], unspecified where a row is to be filled in
    free: np.ndarray  # Bool[N L]
    lengths: np.ndarray  # Int32[N]

    @property
    def within(self) -> np.ndarray:
        """Bool[N L], True before the end of each row."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def take(self, numbers: np.ndarray) -> "Rows":
        """Returns copies of the rows with these numbers, Int[B]."""
        return Rows(*(array[numbers] for array in self))


def joined(*parts: Row) -> Row:
    """Concatenates the parts of a row."""
    return Row(*map(np.concatenate, zip(*parts)))


def as_document(row: Row, layout: Layout, block: int, end_of_text: int | None) -> Row:
    """Formats a complete text like a training document: padded ones have an end-of-text token and scored padding."""
    if not layout.padded:
        return row
    count = max(1, block - len(row.tokens)) if layout.padding == "scored" else 1
    return joined(row, Row(np.full(count, end_of_text, np.int32), np.zeros(count, bool)))


def check_size(rows: int, length: int):
    """Raises UserError for more than MAX_TOKENS tokens in all, before memory is allocated."""
    if rows * length > MAX_TOKENS:
        raise UserError(
            f"{rows:,} x {length:,} tokens are more than the {MAX_TOKENS:,} of one call; sample fewer at a time"
        )


def collate(rows: list[Row], trained: Trained) -> Rows:
    """Collates rows of any lengths for sampling.

    If the network is conditioned on the lengths, tokens after the end of a row have no effect. Otherwise a process with
    a mask keeps them masked, and one without samples the full block, to be cut; either way the row is sampled from its
    exact marginal under the model. Rows longer than a block end with a whole block of generation, the rest unknown.
    """
    mask = trained.process.mask_id
    cut = mask is None and not trained.layout.masks_padding
    lengths = np.array([len(row.tokens) for row in rows], np.int32)
    length = max(int(lengths.max()), trained.block_length if cut else 0)
    if length > trained.block_length:
        length += -length % (trained.network.block_of_generation or 1)
    shape = (len(rows), length)
    tokens, free = np.full(shape, 0 if mask is None else mask, np.int32), np.zeros(shape, bool)
    for number, row in enumerate(rows):
        tokens[number, : lengths[number]] = row.tokens
        free[number, : lengths[number]] = row.free
        free[number, lengths[number] :] = cut and row.free.any()
    return Rows(tokens, free, lengths)


def windows_of(
    rows: Rows, block: int, stride: int | None = None, multiple: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each of the `windows`, its positions, Int[N block], and which are free in no window before, Bool."""
    free = rows.free.copy()
    for start in windows(rows.lengths, block, stride, multiple):
        at = start[:, None] + np.arange(min(block, free.shape[1]))
        yield at, np.take_along_axis(free, at, axis=1)
        np.put_along_axis(free, at, False, axis=1)


def windows(lengths: np.ndarray, block: int, stride: int | None = None, multiple: int = 1) -> Iterator[np.ndarray]:
    """Yields the start of each row's window, Int[B], for semi-autoregressive sampling. lengths: Int[B].

    A window begins `stride` positions after the one before it, by default half a block. The last window of a row ends
    with the row; shorter rows repeat their last. multiple: of which all starts are multiples, so that the last window
    may end after the row.
    """
    last = np.maximum(lengths - block, 0)
    last += -last % multiple
    stride = stride or max(multiple, (block - block // 2) // multiple * multiple)
    for number in range(-(-int(last.max()) // stride) + 1):
        yield np.minimum(number * stride, last)
