"""`text:GLOB`: UTF-8 files, each a document."""

import glob
import os
from pathlib import Path

from sedd.data.source import Source
from sedd.errors import UserError


def open_text(spec: str) -> Source:
    """The files that match the pattern after `text:`, sorted by path; `**` matches folders at any depth.

    Raises:
      UserError: no file matches, or, while reading, a file is not UTF-8.
    """
    pattern = os.path.expanduser(spec.partition(":")[2])
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise UserError(f"no file matches {pattern!r} (seen from {Path.cwd()}); change the pattern after 'text:'")
    return Source(spec, joiner=None, read=lambda: map(_read, paths))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text, which would turn CRLF into LF
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: the byte at position {error.start} does not fit; convert it") from error
