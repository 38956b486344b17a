"""Where text comes from. A new source is a file like `source_text.py` and a line in `SOURCES`."""

from collections.abc import Callable

from sedd.data.source import Source
from sedd.data.source_functions import open_functions
from sedd.data.source_names import open_names
from sedd.data.source_text import open_text
from sedd.errors import UserError

SOURCES: dict[str, Callable[[str], Source]] = {
    "text": open_text,
    "builtin:names": open_names,
    "builtin:functions": open_functions,
}


def open_source(spec: str) -> Source:
    """The source that a spec names: an entry of `SOURCES`, or one followed by a colon and what is its own.

    Raises:
      UserError: there is no such source.
    """
    name = spec if spec in SOURCES else spec.partition(":")[0]
    if name not in SOURCES:
        raise UserError(f"unknown source {spec!r}; there are {', '.join(SOURCES)} (as in text:books/*.txt)")
    return SOURCES[name](spec)
