"""Sources of text: documents that can be read repeatedly, in pieces that fit into memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LONGEST_PIECE = 1_000_000  # characters; tokenising takes many times the memory of the text


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Source:
    """The documents of a corpus, read again on each iteration instead of held in memory.

    spec: as the user wrote it, such as `text:books/*.txt`. joiner: text that follows each document as ordinary tokens;
    None where an end-of-text id does. read: starts a pass over the documents, each a string, or an iterable of its
    parts if it may not fit into memory. files: those read, to detect changes; empty for constant text. in_order: True
    where the documents are consecutive parts of running text, so that a corpus keeps their order.
    """

    spec: str
    joiner: str | None
    read: Callable[[], Iterator[str | Iterable[str]]]
    files: tuple[Path, ...] = ()
    in_order: bool = False

    def __iter__(self) -> Iterator[Piece]:
        """Yields the documents in pieces, each document followed by the joiner; empty documents are skipped."""
        for document in self.read():
            previous = None
            for text in split_document(document):
                if previous is not None:
                    yield Piece(previous, False)
                previous = text
            if previous:
                yield Piece(previous + (self.joiner or ""), True)


def split_document(document: str | Iterable[str]) -> Iterator[str]:
    """Yields a document in pieces of at most `LONGEST_PIECE` characters, cut after a newline, else before a space.

    document: a string, or its parts; the cuts do not depend on the parts.
    """
    if isinstance(document, str):
        document = (document,) if len(document) <= LONGEST_PIECE else _slices(document)
    rest = ""
    for part in document:
        rest += part
        while len(rest) > LONGEST_PIECE:
            end = rest.rfind("\n", 0, LONGEST_PIECE) + 1
            end = end or max(rest.rfind(" ", 0, LONGEST_PIECE), 0) or LONGEST_PIECE
            yield rest[:end]
            rest = rest[end:]
    yield rest


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + LONGEST_PIECE] for start in range(0, len(text), LONGEST_PIECE))
