"""Writes the files of the splits of a corpus directory (see `corpus.py`).

Any number of threads tokenise the text in chunks; one thread writes them in order, so that the files do not depend on
the number of threads. The progress is recorded every few seconds, and writing resumes from there after an interruption.
"""

import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd.data.layout import Layout
from sedd.data.source import LONGEST_PIECE
from sedd.data.splits import Segment
from sedd.data.tokenizers import Ends, Tokenizer, check_ids
from sedd.runtime.disk import write_text_atomic

COPY_SIZE = 2**24  # bytes copied at a time
RECORD_INTERVAL = 2.0  # seconds between records of the progress
PARTS = ("tokens", "offsets", "byte_offsets")  # the files of a split
OFFSET = np.dtype("<i8")


class Tokens(NamedTuple):
    """The tokens of a chunk in one split, and the ends of documents in tokens and in bytes."""

    ids: np.ndarray  # UInt[T]
    ends: np.ndarray  # Int64[documents]
    byte_ends: np.ndarray  # Int64[documents]
    num_bytes: int
    num_characters: int


def write_splits(
    folder: Path,
    segments: Iterable[Segment],
    splits: Iterable[str],
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int], None],
) -> dict[str, dict[str, int]]:
    """Tokenises and writes all splits in one pass; resumes an interrupted call into the same folder.

    progress: called with numbers of bytes of text as they are done. Returns the counts of each split: `documents`,
    `tokens`, `bytes` and `characters`.
    """
    record = folder / "written.json"
    splits = list(splits)
    done: dict[str, Any] = {"chunks": 0, "splits": {}, "complete": False}
    if record.is_file():
        done = json.loads(record.read_text())
    if done["complete"]:  # the files may have been moved since
        progress(sum(counts["bytes"] for counts in done["splits"].values()))
        return done["splits"]
    writers = [_SplitWriter(folder, split, token_dtype(tokenizer), done["splits"].get(split)) for split in splits]
    try:
        chunks = _chunks(_parts(tokenizer, segments))
        for _ in range(done["chunks"]):
            progress(sum(len(segment.text.encode("utf-8")) for segment, _ in next(chunks)))
        recorded = time.monotonic()
        tokenised = _tokenise_in_order(tokenizer, chunks, splits, workers)
        for number, tokens in enumerate(tokenised, done["chunks"] + 1):
            for writer, part in zip(writers, tokens):
                writer.append(part)
            done["chunks"] = number
            if time.monotonic() - recorded > RECORD_INTERVAL:
                now = done | {"splits": {writer.split: writer.sync() for writer in writers}}
                write_text_atomic(record, json.dumps(now))
                recorded = time.monotonic()
            progress(sum(part.num_bytes for part in tokens))
        counts = {writer.split: writer.sync() for writer in writers}
        write_text_atomic(record, json.dumps(done | {"splits": counts, "complete": True}))
        return counts
    finally:
        for writer in writers:
            writer.close()


def arrange(written: Path, folder: Path, splits: Iterable[str], dtype: np.dtype, order: np.random.Generator | None):
    """Moves the files of `write_splits` from `written` into `folder`.

    order: shuffles the documents of each split, so that the blocks of all splits have the same distribution: in the
    source's order, adjacent held-out documents would be further apart than adjacent training documents. None keeps the
    source's order.
    """
    for split in splits:
        if order is not None:
            _shuffle(written, folder, split, dtype, order)
            continue
        for part in PARTS:
            if (written / f"{split}.{part}").exists():  # otherwise moved before an interruption
                (written / f"{split}.{part}").replace(folder / f"{split}.{part}")


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the dtype of ids in token files: two bytes if they suffice, else four, little-endian."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def hash_of_splits(folder: Path, splits: Iterable[str], tokenizer: Tokenizer, layout: Layout) -> str:
    """Returns the SHA-256, in hexadecimal, of the token files, the offsets, the tokenizer and the layout."""
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {layout.mode} {layout.padding}".encode())
    for split in splits:
        for part in PARTS[:2]:
            with open(folder / f"{split}.{part}", "rb") as file:
                digest.update(split.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _parts(tokenizer: Tokenizer, segments: Iterable[Segment]) -> Iterator[tuple[Segment, Ends]]:
    """Yields segments that can be encoded separately; a text is a document, or the part of it in one split."""
    segments, others = itertools.tee(segments)
    parts = tokenizer.parts((segment.text, segment.closes) for segment in others)
    return ((segment._replace(text=text), ends) for segment, (text, ends) in zip(segments, parts))


def _chunks(parts: Iterable[tuple[Segment, Ends]]) -> Iterator[list[tuple[Segment, Ends]]]:
    """Yields segments in chunks of about a million characters, each of which a thread tokenises."""
    chunk: list[tuple[Segment, Ends]] = []
    characters = 0
    for part in parts:
        chunk.append(part)
        characters += len(part[0].text)
        if characters >= LONGEST_PIECE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenise_in_order(
    tokenizer: Tokenizer, chunks: Iterator, splits: list[str], workers: int
) -> Iterator[list[Tokens]]:
    """Yields the tokens of each chunk, in order; threads tokenise ahead, since the tokenizers release the GIL."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    try:
        pending: deque[Future[list[Tokens]]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_tokenise, tokenizer, chunk, splits))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenise(tokenizer: Tokenizer, chunk: list[tuple[Segment, Ends]], splits: list[str]) -> list[Tokens]:
    """Returns the tokens of a chunk by split. UserError if an id is outside of the vocabulary."""
    segments, ends = zip(*chunk)
    encoded = tokenizer.encode_all([segment.text for segment in segments], ends)
    end_of_text = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int32)
    tokens = []
    for split in splits:
        parts, ends_of_documents, byte_ends = [end_of_text[:0]], [], []
        total, num_bytes, num_characters = 0, 0, 0
        for segment, ids in zip(segments, encoded):
            if segment.split != split:
                continue
            parts.append(ids)
            total += len(ids)
            num_bytes += len(segment.text.encode("utf-8"))
            num_characters += len(segment.text)
            if segment.ends_document:
                parts.append(end_of_text)
                total += len(end_of_text)
            if segment.closes:
                ends_of_documents.append(total)
                byte_ends.append(num_bytes)
        ids = np.concatenate(parts)
        check_ids(ids, tokenizer.vocab_size, "text that the tokenizer encoded", "choose another tokenizer")
        ids = ids.astype(token_dtype(tokenizer))
        offsets = np.array(ends_of_documents, OFFSET), np.array(byte_ends, OFFSET)
        tokens.append(Tokens(ids, *offsets, num_bytes, num_characters))
    return tokens


class _SplitWriter:
    """Appends to the files of a split. counts: those of a record, to which the files are truncated; None to start."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, counts: dict[str, int] | None):
        self.split = split
        self._counts = counts or dict.fromkeys(("documents", "tokens", "bytes", "characters"), 0)
        offsets = OFFSET.itemsize * (self._counts["documents"] + 1)
        sizes = (dtype.itemsize * self._counts["tokens"], offsets, offsets)
        paths = [folder / f"{split}.{part}" for part in PARTS]
        self._files = [open(path, "ab", buffering=2**20) for path in paths]  # noqa: SIM115, open until `close`
        for file, size in zip(self._files, sizes):
            file.truncate(size if counts else 0)
        if not counts:  # the first document begins at 0
            for file in self._files[1:]:
                file.write(np.zeros(1, OFFSET).tobytes())

    def append(self, tokens: Tokens) -> None:
        """Appends the tokens of a chunk."""
        counts = self._counts
        new = (tokens.ids, tokens.ends + counts["tokens"], tokens.byte_ends + counts["bytes"])
        for file, values in zip(self._files, new):
            file.write(values.tobytes())
        counts["documents"] += len(tokens.ends)
        counts["tokens"] += len(tokens.ids)
        counts["bytes"] += tokens.num_bytes
        counts["characters"] += tokens.num_characters

    def sync(self) -> dict[str, int]:
        """Writes all appended data to the disk and returns the counts."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return dict(self._counts)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()


def _shuffle(written: Path, folder: Path, split: str, dtype: np.dtype, random: np.random.Generator) -> None:
    """Writes the files of a split with its documents in random order."""
    offsets, byte_offsets = (np.fromfile(written / f"{split}.{part}", OFFSET) for part in PARTS[1:])
    order = np.arange(len(offsets) - 1, dtype=np.uint32)
    random.shuffle(order)
    with open(written / f"{split}.tokens", "rb") as tokens, open(folder / f"{split}.tokens", "wb", 2**20) as file:
        for document in order:  # read, not mapped: mapped pages would count as memory of this process
            tokens.seek(dtype.itemsize * int(offsets[document]))
            left = dtype.itemsize * int(offsets[document + 1] - offsets[document])
            while left:
                left -= file.write(tokens.read(min(left, COPY_SIZE)))
    for part, values in zip(PARTS[1:], (offsets, byte_offsets)):
        sizes = np.diff(values)[order]
        values[1:] = np.cumsum(sizes)
        (folder / f"{split}.{part}").write_bytes(values.data)
