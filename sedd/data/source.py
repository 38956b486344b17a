"""What a source of text is: documents that can be read as often as one likes, in pieces that fit into memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LONGEST_PIECE = 1_000_000  # characters; tokenising takes many times the memory of its text


class Piece(NamedTuple):
    """A document, or where it is long a part of it."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Source:
    """The documents of a corpus, read anew on each iteration, so that nobody has to hold the whole text.

    Attributes:
      spec: what the user wrote, such as `text:books/*.txt`.
      joiner: the text that follows each document as ordinary tokens; None where an end-of-text id does instead.
      read: begins another pass over the documents; each is a string, or its parts where it may not fit into memory.
      files: what is read, so that a change is noticed; none for what never changes.
      in_order: whether each document goes on where the one before it ended, so that a corpus keeps their order.
    """

    spec: str
    joiner: str | None
    read: Callable[[], Iterator[str | Iterable[str]]]
    files: tuple[Path, ...] = ()
    in_order: bool = False

    def __iter__(self) -> Iterator[Piece]:
        """The documents in pieces, each followed by the joiner; an empty document has nothing to teach."""
        for document in self.read():
            before = None
            for text in pieces(document):
                if before is not None:
                    yield Piece(before, False)
                before = text
            if before:
                yield Piece(before + (self.joiner or ""), True)


def pieces(document: str | Iterable[str]) -> Iterator[str]:
    """A document in pieces of at most `LONGEST_PIECE` characters, cut behind a newline, else before a space.

    Where it is cut does not depend on the parts in which it comes.
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
