"""Which held-out documents are also in train: those that are, id for id, what a model learns from.

Documents are compared by hashes of 64 bits. Those of held-out documents are kept, and train is read in parts, so that
the memory does not grow with it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sedd.data.scan import PROGRESS_DELAY

PART = 2**16  # ids read at once: what a cache holds
_ODD = tuple(np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93))
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # Stafford's thirteenth mix, that of SplitMix64


def also_in_train(folder: Path, splits: Iterable[str], dtype: np.dtype) -> dict[str, dict[str, int]]:
    """Of each split but train, how many of its documents are also in train, and the tokens of those.

    An empty document is in none. folder: of the files of the splits, as `corpus.py` has them, with ids of this dtype.
    """
    held_out = {split: _concatenated(_hashes(folder, split, dtype)) for split in splits if split != "train"}
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *(hashes for hashes, _ in held_out.values())]))
    found = np.zeros(len(wanted), bool)
    for hashes, _ in _hashes(folder, "train", dtype) if len(wanted) else ():
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        found[at[wanted[at] == hashes]] = True
    counts = {}
    for split, (hashes, sizes) in held_out.items():
        copies = np.isin(hashes, wanted[found])
        counts[split] = {"documents": int(copies.sum()), "tokens": int(sizes[copies].sum())}
    return counts


def _hashes(folder: Path, split: str, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The hash and the tokens of each document that has any, UInt64[D] and Int64[D], in parts.

    A hash is the sum, modulo 2^64, of the document's ids, each mixed with its place.
    """
    offsets = np.memmap(folder / f"{split}.offsets", "<i8", mode="r")
    first, begun = 0, np.zeros(1, np.uint64)  # the document that the last part ended in, and the sum of its ids so far
    total = int(offsets[-1])
    shown = tqdm(desc=f"comparing {split}", total=total, unit=" tokens", unit_scale=True, delay=PROGRESS_DELAY)
    with shown, open(folder / f"{split}.tokens", "rb") as file:  # read: the pages of a map count as memory of a process
        for start in range(0, total, PART):
            ids = np.frombuffer(file.read(PART * dtype.itemsize), dtype)
            stop = start + len(ids)
            last = int(np.searchsorted(offsets, stop, side="right")) - 1  # the documents before it end here
            edges = np.array(offsets[first : last + 1])
            within = np.maximum(edges - start, 0)
            places = np.arange(start, stop) - np.repeat(edges, np.diff(np.append(within, len(ids))))
            sums = np.concatenate([[np.uint64(0)], np.cumsum(_mixed(ids, places), dtype=np.uint64)])
            hashes, sizes = np.diff(sums[within]), np.diff(edges)
            hashes[:1] += begun
            rest = sums[-1:] - sums[within[-1:]]
            first, begun = last, rest + begun if last == first else rest
            yield hashes[sizes > 0], sizes[sizes > 0]
            shown.update(len(ids))


def _mixed(ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A number for each id at its place, UInt64[T], which differs in half its bits where one of them differs."""
    mixed = ids.astype(np.uint64) * _ODD[0] + (places.astype(np.uint64) + np.uint64(1)) * _ODD[1]
    for shift, factor in _MIXES:
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _concatenated(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    empty = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return tuple(map(np.concatenate, zip(empty, *parts)))
