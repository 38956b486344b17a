"""`builtin:names`: the names of the characters of Unicode 14, such as GREEK SMALL LETTER OMEGA WITH TONOS.

26,540 documents of 724 kB with their newlines. A name never changes once given, so they are the same on every Python.
Families numbered or made by rule (CJK, Hangul, Tangut, Egyptian, ...) are left out.
"""

import json
import unicodedata
from collections.abc import Iterator
from importlib import resources

from sedd.data.source import Source


def open_names(spec: str) -> Source:
    """One name a document, in the order of code points, joined by newlines."""
    return Source(spec, joiner="\n", read=_names)


def _names() -> Iterator[str]:
    ranges = json.loads(resources.files("sedd.data").joinpath("unicode-14-names.json").read_bytes())
    for first, last in ranges:
        for code_point in range(first, last + 1):
            yield unicodedata.name(chr(code_point))
