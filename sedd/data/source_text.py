"""`text:GLOB`: UTF-8 files, each a document, exactly as they are."""

from sedd.data.files import open_files, text_parts
from sedd.data.source import Source


def open_text(spec: str) -> Source:
    """The files that match the pattern, sorted by path; each is read in parts, whatever its size.

    Raises:
      UserError: no file matches, or, while reading, a file is damaged or not UTF-8.
    """
    return open_files(spec, lambda path: iter([text_parts(path)]))
