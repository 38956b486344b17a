"""`lines:GLOB`: UTF-8 files, each line a document."""

from collections.abc import Iterator
from pathlib import Path

from sedd.data.files import numbered_lines, open_files
from sedd.data.source import Source


def open_lines(spec: str) -> Source:
    """Returns the source of the lines of the files that match the pattern, without their line ends, LF or CRLF.

    Empty lines are skipped. UserError if no file matches, or, while reading, a file is damaged or not UTF-8.
    """
    return open_files(spec, _documents)


def _documents(path: Path) -> Iterator[str]:
    for _, line in numbered_lines(path):
        yield line.removesuffix("\n").removesuffix("\r")
