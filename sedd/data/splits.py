"""Which text is for training, which for validation, and which for the test."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sedd.data.source import Source
from sedd.data.survey import Survey
from sedd.errors import UserError

SPLITS = ("train", "validation", "test")
HELD_OUT = 5  # per cent in validation, and as much in test
FEW_DOCUMENTS = 40  # fewer are cut in order, since 5 per cent of them is no sample


class Segment(NamedTuple):
    """Text of one split: a document with its joiner, or the part of it on one side of a cut between splits."""

    split: str
    text: str
    ends_document: bool


def has_many_documents(counted: Survey) -> bool:
    """Whether documents are drawn for the splits; else the text is cut."""
    return counted.documents >= FEW_DOCUMENTS


def segments(source: Source, counted: Survey, seed: int) -> Iterator[Segment]:
    """Reads the source once more and says to which split its text belongs.

    Documents are drawn at random, or where they are few the text is cut in order: the first 90 per cent of its
    characters, then 5 and 5.

    Raises:
      UserError: a split would be empty.
    """
    if has_many_documents(counted):
        return _drawn(source, counted.documents, seed)
    ends = [counted.characters * percent // 100 for percent in (100 - 2 * HELD_OUT, 100 - HELD_OUT, 100)]
    spans = list(zip(SPLITS, [0, *ends], ends, strict=False))
    for split, first, last in spans:
        if first == last:
            raise UserError(f"the {split} split of {source.spec} would be empty, it is too short; add text")
    return _cut(source, spans)


def philox(seed: int, purpose: int) -> np.random.Generator:
    """The random numbers of one purpose."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, purpose], np.uint64)))


def _drawn(source: Source, documents: int, seed: int) -> Iterator[Segment]:
    held_out = round(documents * HELD_OUT / 100)
    order = philox(seed, 0).permutation(documents)
    split_of = np.zeros(documents, np.uint8)
    split_of[order[:held_out]] = 1
    split_of[order[held_out : 2 * held_out]] = 2
    for document, split in zip(source, split_of, strict=True):
        yield Segment(SPLITS[split], document + (source.joiner or ""), ends_document=True)


def _cut(source: Source, spans: list[tuple[str, int, int]]) -> Iterator[Segment]:
    start = 0
    for document in source:
        text = document + (source.joiner or "")
        end = start + len(text)
        for split, first, last in spans:
            part = text[max(first - start, 0) : max(last - start, 0)]
            if part:
                yield Segment(split, part, ends_document=end <= last)
        start = end
