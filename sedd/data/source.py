"""What a source of text is: documents that can be read as often as one likes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """The documents of a corpus, read anew on each iteration, so that nobody has to hold the whole text.

    Attributes:
      spec: what the user wrote, such as `text:books/*.txt`.
      joiner: the text that follows each document as ordinary tokens; None where an end-of-text id does instead.
      read: begins another pass over the documents.
    """

    spec: str
    joiner: str | None
    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return (document for document in self.read() if document)  # an empty document has nothing to teach
