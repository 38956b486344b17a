"""Counts the held-out documents whose ids are exactly those of a training document.

Documents are compared by 64-bit hashes. The hashes of held-out documents are kept in memory, and train is read in
parts, so that memory does not grow with its size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sedd.data.scan import PROGRESS_DELAY

PART = 2**16  # ids read at once: they fit into a CPU cache
_ODD = tuple(np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93))
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # Stafford's Mix13, as in SplitMix64


def also_in_train(folder: Path, splits: Iterable[str], dtype: np.dtype) -> dict[str, dict[str, int]]:
    """Returns, of each split but train, the numbers of documents that are also in train and of their tokens.

    Empty documents are not counted. folder: has the files of the splits (see `corpus.py`), with ids of this dtype.
    """
    held_out = {split: _concatenated(_hashes(folder, split, dtype)) for split in splits if split != "train"}
    candidates = np.unique(np.concatenate([np.zeros(0, np.uint64), *(hashes for hashes, _ in held_out.values())]))
    in_train = np.zeros(len(candidates), bool)
    for hashes, _ in _hashes(folder, "train", dtype) if len(candidates) else ():
        index = np.minimum(np.searchsorted(candidates, hashes), len(candidates) - 1)
        in_train[index[candidates[index] == hashes]] = True
    counts = {}
    for split, (hashes, sizes) in held_out.items():
        copies = np.isin(hashes, candidates[in_train])
        counts[split] = {"documents": int(copies.sum()), "tokens": int(sizes[copies].sum())}
    return counts


def _hashes(folder: Path, split: str, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the hashes and the numbers of tokens of nonempty documents, UInt64[D] and Int64[D], in parts.

    A hash is the sum, modulo 2^64, of the document's ids, each mixed with its position.
    """
    offsets = np.memmap(folder / f"{split}.offsets", "<i8", mode="r")
    first, partial = 0, np.zeros(1, np.uint64)  # the document in which the last part ended, and its sum so far
    total = int(offsets[-1])
    shown = tqdm(desc=f"comparing {split}", total=total, unit=" tokens", unit_scale=True, delay=PROGRESS_DELAY)
    with shown, open(folder / f"{split}.tokens", "rb") as file:  # not mapped: mapped pages count as memory of a process
        for start in range(0, total, PART):
            ids = np.frombuffer(file.read(PART * dtype.itemsize), dtype)
            stop = start + len(ids)
            last = int(np.searchsorted(offsets, stop, side="right")) - 1  # the documents before it end in this part
            edges = np.array(offsets[first : last + 1])
            within = np.maximum(edges - start, 0)
            positions = np.arange(start, stop) - np.repeat(edges, np.diff(np.append(within, len(ids))))
            sums = np.concatenate([[np.uint64(0)], np.cumsum(_mixed(ids, positions), dtype=np.uint64)])
            hashes, sizes = np.diff(sums[within]), np.diff(edges)
            hashes[:1] += partial
            rest = sums[-1:] - sums[within[-1:]]
            first, partial = last, rest + partial if last == first else rest
            yield hashes[sizes > 0], sizes[sizes > 0]
            shown.update(len(ids))


def _mixed(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns a hash of each (id, position), UInt64[T]: if either changes, half of the bits change on average."""
    mixed = ids.astype(np.uint64) * _ODD[0] + (positions.astype(np.uint64) + np.uint64(1)) * _ODD[1]
    for shift, factor in _MIXES:
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _concatenated(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    hashes, sizes = zip((np.zeros(0, np.uint64), np.zeros(0, np.int64)), *parts)
    return np.concatenate(hashes), np.concatenate(sizes)
