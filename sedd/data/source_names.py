"""`builtin:names`: the names of the characters of Unicode 14, such as GREEK SMALL LETTER OMEGA WITH TONOS.

26,540 documents, 724 kB with their newlines. Unicode never changes a name, so that they do not depend on the version of
Python. Names that are numbered or derived by rule (CJK, Hangul, Tangut, Egyptian, ...) are excluded.
"""

import json
import unicodedata
from collections.abc import Iterator
from importlib import resources

from sedd.data.source import Source


def open_names(spec: str) -> Source:
    """Returns the source of one document per name, in the order of code points, joined by newlines."""
    return Source(spec, joiner="\n", read=_names)


def _names() -> Iterator[str]:
    ranges = json.loads(resources.files("sedd.data").joinpath("unicode-14-names.json").read_bytes())
    for first, last in ranges:
        for code_point in range(first, last + 1):
            yield unicodedata.name(chr(code_point))
