"""Which text is for training, which for validation, and which for the test: chosen once, and recorded.

    documents:0.9,0.05,0.05   documents drawn at random, in these proportions
    position:90,5,5           the text cut in order, in these proportions of its characters
    last:100000               the last 100,000 documents for validation; last:100000,5000 has 5,000 more for the test

A new rule is a small class and a line in `RULES`.
"""

import abc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from sedd.data.scan import Scan
from sedd.data.source import Piece
from sedd.errors import UserError
from sedd.seeds import check_seed

SPLITS = ("train", "validation", "test")
FEW_DOCUMENTS = 40  # fewer are cut in order by default, since 5 per cent of them is no sample


class Segment(NamedTuple):
    """Text of one split: a piece of a document, or the part of it on one side of a cut between splits."""

    split: str
    text: str
    closes: bool  # the document, or what of it is in this split, ends here
    ends_document: bool


@dataclass(frozen=True)
class Rule(abc.ABC):
    """How a source is split. numbers: what follows the colon, of one split each, in the order of `SPLITS`."""

    name: ClassVar[str]
    in_order: ClassVar[bool]  # whether the splits keep the order of the source
    numbers: tuple[float, ...]

    @property
    def spec(self) -> str:
        """The rule as it is written, every digit of it: two rules are one if their specs are."""
        return f"{self.name}:{','.join(str(number).removesuffix('.0') for number in self.numbers)}"

    @abc.abstractmethod
    def sizes(self, counted: Scan) -> dict[str, int]:
        """How much of the source each split gets."""

    @abc.abstractmethod
    def segments(self, pieces: Iterable[Piece], counted: Scan, seed: int) -> Iterator[Segment]:
        """Says to which split each piece belongs."""


class Documents(Rule):
    """Documents drawn at random."""

    name, in_order = "documents", False

    def sizes(self, counted):
        return _shared(counted.documents, self.numbers)

    def segments(self, pieces, counted, seed):
        order = np.arange(counted.documents, dtype=np.uint32)
        philox(seed, 0).shuffle(order)
        split_of = np.zeros(counted.documents, np.uint8)
        start = 0
        for split, size in list(enumerate(self.sizes(counted).values()))[1:]:
            split_of[order[start : start + size]] = split
            start += size
        return _by_document(pieces, split_of)


class Last(Rule):
    """The last documents are held out, those of the test after those of the validation."""

    name, in_order = "last", False

    def sizes(self, counted):
        held_out = [int(number) for number in self.numbers]
        return dict(zip(SPLITS, [counted.documents - sum(held_out), *held_out]))

    def segments(self, pieces, counted, seed):
        sizes = self.sizes(counted).values()
        return _by_document(pieces, np.repeat(np.arange(len(sizes), dtype=np.uint8), list(sizes)))


class Position(Rule):
    """The text is cut in order, by characters."""

    name, in_order = "position", True

    def sizes(self, counted):
        return _shared(counted.characters, self.numbers)

    def segments(self, pieces, counted, seed):
        sizes = self.sizes(counted)
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
    """The rule that a spec names. UserError if there is none."""
    name, _, numbers = spec.partition(":")
    try:
        values = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        values = ()
    most = len(SPLITS) - (name == "last")
    fits = 1 <= len(values) <= most and all(0 <= value < np.inf for value in values) and any(values)
    if name not in RULES or not fits or (name == "last" and any(value % 1 for value in values)):
        forms = "documents:0.9,0.05,0.05, position:90,5,5 or last:100000"
        raise UserError(f"there is no split {spec!r}; write {forms}")
    return RULES[name](values)


def default_rule(counted: Scan) -> Rule:
    """Documents are drawn; where they are few, the text is cut."""
    if counted.documents >= FEW_DOCUMENTS:
        return Documents((0.9, 0.05, 0.05))
    return Position((90, 5, 5))


def check_sizes(rule: Rule, counted: Scan, source: str):
    """UserError where a split would be empty."""
    for split, size in rule.sizes(counted).items():
        if size < 1:
            raise UserError(
                f"the {split} split of {source} would be empty with {rule.spec}; add text, or change --split"
            )


def philox(seed: int, purpose: int) -> np.random.Generator:
    """The random numbers of one purpose. UserError for a seed that is none."""
    return np.random.Generator(np.random.Philox(key=np.array([check_seed(seed), purpose], np.uint64)))


def _shared(total: int, proportions: tuple[float, ...]) -> dict[str, int]:
    """Parts of a total; what rounding leaves over is for training."""
    others = [round(total * part / sum(proportions)) for part in proportions[1:]]
    return dict(zip(SPLITS, [total - sum(others) if proportions[0] > 0 else 0, *others]))


def _by_document(pieces: Iterable[Piece], split_of: np.ndarray) -> Iterator[Segment]:
    document = 0
    for text, ends_document in pieces:
        yield Segment(SPLITS[split_of[document]], text, ends_document, ends_document)
        document += ends_document
