"""Writes the files of a corpus directory that hold its splits; `corpus.py` says what they are."""

import hashlib
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from sedd.data.splits import SPLITS, Segment
from sedd.data.tokenizers import Tokenizer


def write_splits(
    folder: Path, parts: Iterable[Segment], tokenizer: Tokenizer, order: np.random.Generator | None
) -> dict[str, dict[str, int]]:
    """Tokenises and writes all splits in one pass.

    Args:
      order: puts the documents of each split in a random order, so that the blocks of all splits are alike: in the
        source's order the neighbours of a held-out document would be further apart than those of a training document.
        None keeps the source's order.

    Returns:
      The counts of each split: `documents`, `tokens` and `bytes`.
    """
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_SplitWriter(folder, split, token_dtype(tokenizer))) for split in SPLITS}
        for part in parts:
            ids = tokenizer.encode(part.text)
            if part.ends_document and tokenizer.end_of_text is not None:
                ids = np.append(ids, tokenizer.end_of_text)
            writers[part.split].append(ids, len(part.text.encode("utf-8")))
    if order is not None:
        for split in SPLITS:
            _shuffle(folder, split, token_dtype(tokenizer), order)
    return {split: writer.counts() for split, writer in writers.items()}


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of ids in token files: two bytes where they suffice, little-endian."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def hash_of_splits(folder: Path, tokenizer: Tokenizer) -> str:
    """SHA-256, in hexadecimal, of the token files, the offsets and the tokenizer."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for split in SPLITS:
        with open(folder / f"{split}.tokens", "rb") as tokens:
            digest.update(hashlib.file_digest(tokens, "sha256").digest())
        digest.update(np.load(folder / f"{split}.offsets.npy").tobytes())
    return digest.hexdigest()


def _shuffle(folder: Path, split: str, dtype: np.dtype, random: np.random.Generator) -> None:
    """Rewrites the files of a split with its documents in random order, one document in memory at a time."""
    offsets, num_bytes = np.load(folder / f"{split}.offsets.npy"), np.load(folder / f"{split}.bytes.npy")
    tokens = np.memmap(folder / f"{split}.tokens", dtype, mode="r")
    order = random.permutation(len(num_bytes))
    with open(folder / "shuffled", "wb", buffering=2**20) as file:
        for document in order:
            file.write(tokens[offsets[document] : offsets[document + 1]].tobytes())
    (folder / "shuffled").replace(folder / f"{split}.tokens")
    np.save(folder / f"{split}.offsets.npy", np.concatenate([[0], np.cumsum(np.diff(offsets)[order])]).astype("<i8"))
    np.save(folder / f"{split}.bytes.npy", num_bytes[order])


class _SplitWriter:
    """Appends documents to the token file of a split; on leaving, writes their offsets and bytes."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._tokens = open(folder / f"{split}.tokens", "wb", buffering=2**20)
        self._offsets, self._bytes = array("q", [0]), array("q")

    def append(self, ids: np.ndarray, num_bytes: int) -> None:
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._bytes.append(num_bytes)

    def counts(self) -> dict[str, int]:
        return {"documents": len(self._bytes), "tokens": self._offsets[-1], "bytes": sum(self._bytes)}

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._tokens.close()
        np.save(self._folder / f"{self._split}.offsets.npy", np.asarray(self._offsets, "<i8"))
        np.save(self._folder / f"{self._split}.bytes.npy", np.asarray(self._bytes, "<i8"))
