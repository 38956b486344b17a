"""The registry of text sources. To add one, write a file like `source_lines.py` and add a line to `SOURCES`."""

from collections.abc import Callable

from sedd.data.source import Source
from sedd.data.source_benchmarks import BENCHMARKS, open_benchmark, open_text8
from sedd.data.source_csv import open_csv
from sedd.data.source_functions import open_functions
from sedd.data.source_jsonl import open_jsonl
from sedd.data.source_lines import open_lines
from sedd.data.source_names import open_names
from sedd.data.source_parquet import open_parquet
from sedd.data.source_text import open_text
from sedd.data.source_tfds import open_tfds
from sedd.errors import UserError

# By the beginning of a spec: the function that opens it, and the form of the spec.
SOURCES: dict[str, tuple[Callable[[str], Source], str]] = {
    "text": (open_text, "text:GLOB"),
    "lines": (open_lines, "lines:GLOB"),
    "jsonl": (open_jsonl, "jsonl:GLOB:FIELD"),
    "csv": (open_csv, "csv:GLOB:COLUMN"),
    "parquet": (open_parquet, "parquet:GLOB:COLUMN"),
    "tfds": (open_tfds, "tfds:NAME[:SPLIT[:FIELD]]"),
    **{name: (open_benchmark, f"{name}:GLOB") for name in BENCHMARKS},
    "text8": (open_text8, "text8:GLOB"),
    "builtin:names": (open_names, "builtin:names"),
    "builtin:functions": (open_functions, "builtin:functions"),
}
FORMS = tuple(form for _, form in SOURCES.values())


def open_source(spec: str) -> Source:
    """Returns the source of a spec, which has one of `FORMS`. UserError if there is none, or nothing to read."""
    name = spec if spec in SOURCES else spec.partition(":")[0]
    if name not in SOURCES:
        raise UserError(f"unknown source {spec!r}; write {', '.join(FORMS)} (as in text:books/*.txt)")
    return SOURCES[name][0](spec)
