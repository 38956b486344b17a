"""Rules that split a source into train, validation and test.

    documents:0.9,0.05,0.05   documents drawn at random, in these proportions
    position:90,5,5           the text cut in order, in these proportions of its characters
    last:100000               the last 100,000 documents for validation; last:100000,5000 has 5,000 more for the test

To add a rule, write a small class and add it to `RULES`.
"""

import abc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from sedd.data.scan import Scan
from sedd.data.source import Piece
from sedd.errors import UserError
from sedd.seeds import HELD_OUT_DOCUMENTS, philox

SPLITS = ("train", "validation", "test")
MIN_DOCUMENTS_TO_DRAW = 40  # fewer are cut in order by default: 5 per cent of them is too small a sample


class Segment(NamedTuple):
    """Text of one split: a piece of a document, or the part of it on one side of a cut between splits."""

    split: str
    text: str
    closes: bool  # the document, or its part in this split, ends here
    ends_document: bool  # the document ends here


@dataclass(frozen=True)
class Rule(abc.ABC):
    """A rule that splits a source. numbers: those after the colon, one per split, in the order of `SPLITS`."""

    name: ClassVar[str]
    in_order: ClassVar[bool]  # True where the splits keep the order of the source
    numbers: tuple[float, ...]

    @property
    def spec(self) -> str:
        """The spec with all digits: two rules are equal exactly if their specs are."""
        return f"{self.name}:{','.join(str(number).removesuffix('.0') for number in self.numbers)}"

    @abc.abstractmethod
    def sizes(self, scan: Scan) -> dict[str, int]:
        """Returns the size of each split, in documents or characters."""

    @abc.abstractmethod
    def segments(self, pieces: Iterable[Piece], scan: Scan, seed: int) -> Iterator[Segment]:
        """Yields the pieces with their splits; cuts a piece that belongs to several."""


class Documents(Rule):
    """Documents drawn at random."""

    name, in_order = "documents", False

    def sizes(self, scan):
        return _divide(scan.documents, self.numbers)

    def segments(self, pieces, scan, seed):
        order = np.arange(scan.documents, dtype=np.uint32)
        philox(seed, HELD_OUT_DOCUMENTS).shuffle(order)
        split_of = np.zeros(scan.documents, np.uint8)
        start = 0
        for split, size in list(enumerate(self.sizes(scan).values()))[1:]:
            split_of[order[start : start + size]] = split
            start += size
        return _by_document(pieces, split_of)


class Last(Rule):
    """The last documents, those of the test split after those of the validation split."""

    name, in_order = "last", False

    def sizes(self, scan):
        held_out = [int(number) for number in self.numbers]
        return dict(zip(SPLITS, [scan.documents - sum(held_out), *held_out]))

    def segments(self, pieces, scan, seed):
        sizes = self.sizes(scan).values()
        return _by_document(pieces, np.repeat(np.arange(len(sizes), dtype=np.uint8), list(sizes)))


class Position(Rule):
    """The text cut in order, by characters."""

    name, in_order = "position", True

    def sizes(self, scan):
        return _divide(scan.characters, self.numbers)

    def segments(self, pieces, scan, seed):
        sizes = self.sizes(scan)
        ends = np.cumsum(list(sizes.values())).tolist()
        start = 0
        for text, ends_document in pieces:
            end = start + len(text)
            for split, first, last in zip(sizes, [0, *ends], ends):
                part = text[max(first - start, 0) : max(last - start, 0)]
                if part:
                    ends_here = ends_document and end <= last
                    yield Segment(split, part, ends_here or end >= last, ends_here)
            start = end


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Documents, Position, Last)}


def make_rule(spec: str) -> Rule:
    """Returns the rule of a spec. UserError if the spec is invalid."""
    name, _, numbers = spec.partition(":")
    try:
        values = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        values = ()
    max_values = len(SPLITS) - (name == "last")
    valid = 1 <= len(values) <= max_values and all(0 <= value < np.inf for value in values) and any(values)
    if name not in RULES or not valid or (name == "last" and any(value % 1 for value in values)):
        forms = "documents:0.9,0.05,0.05, position:90,5,5 or last:100000"
        raise UserError(f"there is no split {spec!r}; write {forms}")
    return RULES[name](values)


def default_rule(scan: Scan) -> Rule:
    """Returns the default rule: 90, 5 and 5 per cent of the documents, or of the text if it has too few documents."""
    if scan.documents >= MIN_DOCUMENTS_TO_DRAW:
        return Documents((0.9, 0.05, 0.05))
    return Position((90, 5, 5))


def check_sizes(rule: Rule, scan: Scan, source: str):
    """UserError if a split would be empty. source: the spec of the source, for the message."""
    for split, size in rule.sizes(scan).items():
        if size < 1:
            raise UserError(
                f"the {split} split of {source} would be empty with {rule.spec}; add text, or change --split"
            )


def _divide(total: int, proportions: tuple[float, ...]) -> dict[str, int]:
    """Returns the parts of a total by split; train gets the remainder of rounding."""
    others = [round(total * part / sum(proportions)) for part in proportions[1:]]
    return dict(zip(SPLITS, [total - sum(others) if proportions[0] > 0 else 0, *others]))


def _by_document(pieces: Iterable[Piece], split_of: np.ndarray) -> Iterator[Segment]:
    document = 0
    for text, ends_document in pieces:
        yield Segment(SPLITS[split_of[document]], text, ends_document, ends_document)
        document += ends_document
