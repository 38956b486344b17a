"""The text of a corpus: where it comes from, and what of it belongs to which split."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sedd.data.scan import Scan
from sedd.data.source import Source
from sedd.data.sources import open_source
from sedd.data.splits import SPLITS, Rule, Segment, check_sizes, default_rule, make_rule
from sedd.errors import UserError

WHOLE = "whole"  # the name of a source that is still to be split


@dataclass(frozen=True)
class SplitText:
    """Sources by the split that they are; or a single one, under `WHOLE`, with the rule that splits it."""

    sources: dict[str, Source]
    counted: dict[str, Scan]
    rule: Rule | None

    @property
    def splits(self) -> list[str]:
        """The splits that there are, in the order of `SPLITS`."""
        return list(self.sources if self.rule is None else self.rule.sizes(self.counted[WHOLE]))

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self.counted.values())

    @property
    def in_order(self) -> bool:
        """Whether the splits keep the order of the source."""
        return (self.rule is not None and self.rule.in_order) or any(one.in_order for one in self.sources.values())

    @property
    def needs_end_of_text(self) -> bool:
        """Whether an id stands between documents; after the only one it would be an id that training never sees."""
        return any(self.counted[name].documents > 1 for name, one in self.sources.items() if one.joiner is None)

    def origin(self) -> dict[str, str | None]:
        """What is recorded of it: the rule, and a hash of all documents."""
        digest = hashlib.sha256("".join(one.sha256 for one in self.counted.values()).encode())
        return {"split": self.rule and self.rule.spec, "text_sha256": digest.hexdigest()}

    def segments(self, seed: int) -> Iterator[Segment]:
        """Reads the text once more, and says to which split each piece belongs."""
        if self.rule is not None:
            yield from self.rule.segments(self.sources[WHOLE], self.counted[WHOLE], seed)
            return
        for split, source in self.sources.items():
            for text, ends_document in source:
                yield Segment(split, text, ends_document, ends_document and source.joiner is None)

    def of_splits(self, splits: tuple[str, ...], seed: int) -> Iterator[str]:
        """Reads the pieces of some splits only."""
        return (segment.text for segment in self.segments(seed) if segment.split in splits)


def open_sources(spec: str | Mapping[str, str], joined: bool) -> dict[str, Source]:
    """The sources of a text by the split that they are, or under `WHOLE`.

    joined: whether documents follow one another; one that is alone in its row has nothing to be joined to.

    Raises:
      UserError: there is none for training, or a spec is wrong.
    """
    if isinstance(spec, str):
        opened = {WHOLE: open_source(spec)}
    elif "train" in spec and not spec.keys() - set(SPLITS):
        opened = {split: open_source(spec[split]) for split in SPLITS if split in spec}
    else:
        raise UserError("a source for each split needs one for train, and may have one for validation and for test")
    if joined:
        return opened
    return {name: dataclasses.replace(source, joiner=None) for name, source in opened.items()}


def parse_rule(spec: str | None, sources: dict[str, Source]) -> Rule | None:
    """The rule that was asked for. UserError if there is none of that name, or nothing to split."""
    if spec is not None and WHOLE not in sources:
        raise UserError("each split has a source of its own, so there is nothing to split; leave --split out")
    return None if spec is None else make_rule(spec)


def with_split_rule(sources: dict[str, Source], counted: dict[str, Scan], rule: Rule | None) -> SplitText:
    """The text with its rule, by default that for so many documents. UserError where a split would be empty."""
    if WHOLE in sources:
        rule = rule or default_rule(counted[WHOLE])
        check_sizes(rule, counted[WHOLE], sources[WHOLE].spec)
    return SplitText(sources, counted, rule)
