"""`wikitext:GLOB` and others: the texts on which papers report perplexities, from the files as published.

The rows are those of the usual data sets of the same names, detokenised as in the published code. `Source.read` yields
every row, empty ones too, since the protocols of published figures end even an empty row with an id. Iterating over a
source skips empty rows, as with any source.
"""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sedd.data.detokenizers import LAMBADA, LM1B, PTB, SCIENTIFIC_PAPERS, WIKITEXT, Rule, detokenized
from sedd.data.files import csv_rows, numbered_lines, open_files, text_parts
from sedd.data.source import Source
from sedd.data.source_jsonl import json_fields
from sedd.errors import UserError

COLUMNS = ("class", "title", "description")  # of AG News
IN_ORDER = ("wikitext", "ptb")  # benchmarks whose rows are consecutive lines of running text
JSON_LINES = "give a file of JSON lines"
NOT_TEXT8 = re.compile("[^a-z ]")


def open_benchmark(spec: str) -> Source:
    """Returns the source of the rows of the files that match the pattern, in order, detokenised.

    UserError if no file matches, or, while reading, a file has no rows, is damaged, or is not of this benchmark.
    """
    name = spec.partition(":")[0]
    rows, rules, joiner = BENCHMARKS[name]

    def read(path: Path) -> Iterator[str]:
        empty = True
        for row in rows(path):
            empty = False
            yield detokenized(row, rules)
        if empty:
            raise UserError(f"{path} has no rows; leave the file out")

    return replace(open_files(spec, read), joiner=joiner, in_order=name in IN_ORDER)


def open_text8(spec: str) -> Source:
    """Returns the source of text8, 10^8 letters a to z and spaces: one document, read in parts.

    The usual split is position:90,5,5. UserError unless exactly one file matches, or, while reading, if it has another
    character.
    """
    source = open_files(spec, lambda path: iter([_letters(path)]))
    if len(source.files) > 1:
        raise UserError(f"{spec!r} matches {len(source.files)} files, but text8 is a single file; change the pattern")
    return source


def _letters(path: Path) -> Iterator[str]:
    start = 0
    for part in text_parts(path):
        if invalid := NOT_TEXT8.search(part):
            where = f"the character at position {start + invalid.start()} is {invalid[0]!a}, not a to z or space"
            raise UserError(f"{path} is not text8: {where}; give the unpacked file as published")
        start += len(part)
        yield part


def _wikitext(path: Path) -> Iterator[str]:
    """Yields lines with their line ends; a blank line, which contains a space, is an empty row."""
    return (line if line.strip() else "" for _, line in numbered_lines(path))


def _stripped(path: Path) -> Iterator[str]:
    return (line.strip() for _, line in numbered_lines(path))


def _passages(path: Path) -> Iterator[str]:
    for where, _, text in json_fields(path, "text", JSON_LINES):
        if not isinstance(text, str):
            raise UserError(f"{where}: the field 'text' is of type {type(text).__name__}, not text")
        yield _encodable(text, where)


def _articles(path: Path) -> Iterator[str]:
    for where, _, paragraphs in json_fields(path, "article_text", JSON_LINES):
        if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
            raise UserError(f"{where}: the field 'article_text' is not a list of texts; give a file of the release")
        yield _encodable("\n".join(paragraphs), where)


def _news(path: Path) -> Iterator[str]:
    rows = csv_rows(path, skipinitialspace=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(COLUMNS):
                raise UserError(f"{where}: {len(row)} columns, not {len(COLUMNS)} ({', '.join(COLUMNS)}); correct it")
            if not row[0].isdecimal():
                raise UserError(f"{where}: the class {row[0]!r} is not a number; remove the row if it is a header")
            yield f"{row[1]} {row[2]}"
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}; correct the quotes") from error


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        invalid = ascii(error.object[error.start])
        raise UserError(f"{where}: the text contains {invalid}, not a character; correct it") from error
    return text


# By name: the reader of the rows of a file, their detokeniser, and the joiner (None: an end-of-text id).
BENCHMARKS: dict[str, tuple[Callable[[Path], Iterator[str]], tuple[Rule, ...], str | None]] = {
    "wikitext": (_wikitext, WIKITEXT, ""),  # rows include their line ends
    "ptb": (_stripped, PTB, "\n"),
    "lm1b": (_stripped, LM1B, "\n"),
    "lambada": (_passages, LAMBADA, None),
    "ag_news": (_news, (), None),
    "scientific_papers": (_articles, SCIENTIFIC_PAPERS, None),
}
