"""The text of a corpus: its sources, and the assignment of their pieces to splits."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sedd.data.scan import Scan
from sedd.data.source import Source
from sedd.data.sources import open_source
from sedd.data.splits import SPLITS, Rule, Segment, check_sizes, default_rule, make_rule
from sedd.errors import UserError

UNSPLIT = "unsplit"  # the key of a source that a rule splits


@dataclass(frozen=True)
class SplitText:
    """Sources by split; or a single source, under `UNSPLIT`, with the rule that splits it. scans: of the sources."""

    sources: dict[str, Source]
    scans: dict[str, Scan]
    rule: Rule | None

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in the order of `SPLITS`."""
        return list(self.sources if self.rule is None else self.rule.sizes(self.scans[UNSPLIT]))

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of all sources."""
        return sum(one.num_bytes for one in self.scans.values())

    @property
    def in_order(self) -> bool:
        """True where the splits keep the order of the source."""
        return (self.rule is not None and self.rule.in_order) or any(one.in_order for one in self.sources.values())

    @property
    def needs_end_of_text(self) -> bool:
        """True where an id separates documents; after a single document, training would never see that id."""
        return any(self.scans[name].documents > 1 for name, one in self.sources.items() if one.joiner is None)

    def origin(self) -> dict[str, str | None]:
        """Returns the entries of meta.json: the rule, and a hash of all documents."""
        digest = hashlib.sha256("".join(one.sha256 for one in self.scans.values()).encode())
        return {"split": None if self.rule is None else self.rule.spec, "text_sha256": digest.hexdigest()}

    def segments(self, seed: int) -> Iterator[Segment]:
        """Reads the text and yields its pieces with their splits."""
        if self.rule is not None:
            yield from self.rule.segments(self.sources[UNSPLIT], self.scans[UNSPLIT], seed)
            return
        for split, source in self.sources.items():
            for text, ends_document in source:
                yield Segment(split, text, ends_document, ends_document and source.joiner is None)

    def of_splits(self, splits: tuple[str, ...], seed: int) -> Iterator[str]:
        """Reads the text and yields the pieces of these splits only."""
        return (segment.text for segment in self.segments(seed) if segment.split in splits)


def open_sources(spec: str | Mapping[str, str], joined: bool) -> dict[str, Source]:
    """Returns the sources by split, or a single one under `UNSPLIT`.

    joined: False removes the joiners, since documents in separate rows are not joined. UserError if a spec is invalid,
    or there is no source for training.
    """
    if isinstance(spec, str):
        opened = {UNSPLIT: open_source(spec)}
    elif "train" in spec and not spec.keys() - set(SPLITS):
        opened = {split: open_source(spec[split]) for split in SPLITS if split in spec}
    else:
        raise UserError("a source for each split needs one for train, and may have one for validation and for test")
    if joined:
        return opened
    return {name: dataclasses.replace(source, joiner=None) for name, source in opened.items()}


def parse_rule(spec: str | None, sources: dict[str, Source]) -> Rule | None:
    """Returns the rule of a spec, None for None. UserError if the spec is invalid, or there is nothing to split."""
    if spec is not None and UNSPLIT not in sources:
        raise UserError("each split has a separate source, so there is nothing to split; leave --split out")
    return None if spec is None else make_rule(spec)


def with_split_rule(sources: dict[str, Source], scans: dict[str, Scan], rule: Rule | None) -> SplitText:
    """Returns the text with its rule, by default that of `default_rule`. UserError if a split would be empty."""
    if UNSPLIT in sources:
        rule = rule or default_rule(scans[UNSPLIT])
        check_sizes(rule, scans[UNSPLIT], sources[UNSPLIT].spec)
    return SplitText(sources, scans, rule)
