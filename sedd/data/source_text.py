"""`text:GLOB`: UTF-8 files, each a document, unchanged."""

from sedd.data.files import open_files, text_parts
from sedd.data.source import Source


def open_text(spec: str) -> Source:
    """Returns the source of the files that match the pattern, sorted by path; each is read in parts.

    UserError if no file matches, or, while reading, a file is damaged or not UTF-8.
    """
    return open_files(spec, lambda path: iter([text_parts(path)]))
