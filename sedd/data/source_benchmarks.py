"""`wikitext:GLOB` and its like: the texts on which papers report perplexities, from the files as they are published.

Their rows are those of the data sets of the same names that others load, detokenised as others do. A pass of
`Source.read` gives every row, empty ones too: protocols that repeat other people's figures end even an empty row with
an id. Iterated, a source drops them as any other does.
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
IN_ORDER = ("wikitext", "ptb")  # whose rows are the lines of running text
JSON_LINES = "give a file of JSON lines"
NOT_TEXT8 = re.compile("[^a-z ]")


def open_benchmark(spec: str) -> Source:
    """The rows of the files that match the pattern, in order, detokenised.

    Raises:
      UserError: no file matches, or, while reading, a file has no rows, is damaged, or is none of this benchmark.
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
    """text8, a hundred million letters a to z and spaces: one document, in parts. Its usual split is position:90,5,5.

    Raises:
      UserError: not one file matches, or, while reading, another character is found.
    """
    source = open_files(spec, lambda path: iter([_letters(path)]))
    if len(source.files) > 1:
        raise UserError(f"{spec!r} matches {len(source.files)} files, but text8 is one; change the pattern")
    return source


def _letters(path: Path) -> Iterator[str]:
    start = 0
    for part in text_parts(path):
        if wrong := NOT_TEXT8.search(part):
            where = f"the character at position {start + wrong.start()} is {wrong[0]!a}, none of a to z and space"
            raise UserError(f"{path} is not text8: {where}; give the unpacked file as it was published")
        start += len(part)
        yield part


def _wikitext(path: Path) -> Iterator[str]:
    """Lines with their ends; a blank one, which holds a space, is an empty row."""
    return (line if line.strip() else "" for _, line in numbered_lines(path))


def _stripped(path: Path) -> Iterator[str]:
    return (line.strip() for _, line in numbered_lines(path))


def _passages(path: Path) -> Iterator[str]:
    for where, _, text in json_fields(path, "text", JSON_LINES):
        if not isinstance(text, str):
            raise UserError(f"{where}: its field 'text' holds no text, but a {type(text).__name__}")
        yield _encodable(text, where)


def _articles(path: Path) -> Iterator[str]:
    for where, _, paragraphs in json_fields(path, "article_text", JSON_LINES):
        if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
            raise UserError(f"{where}: its field 'article_text' is no list of texts; give a file of the release")
        yield _encodable("\n".join(paragraphs), where)


def _news(path: Path) -> Iterator[str]:
    rows = csv_rows(path, skipinitialspace=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(COLUMNS):
                raise UserError(f"{where}: {len(row)} columns, not {len(COLUMNS)} ({', '.join(COLUMNS)}); mend the row")
            if not row[0].isdecimal():
                raise UserError(f"{where}: the class {row[0]!r} is no number; take out the row if it is a header")
            yield f"{row[1]} {row[2]}"
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}; mend the quotes") from error


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: its text holds {error.object[error.start]!a}, no character; mend it") from error
    return text


# The rows of a file, their detokeniser, and the text that follows each in a stream (None: an end-of-text id does).
BENCHMARKS: dict[str, tuple[Callable[[Path], Iterator[str]], tuple[Rule, ...], str | None]] = {
    "wikitext": (_wikitext, WIKITEXT, ""),  # rows carry their line ends
    "ptb": (_stripped, PTB, "\n"),
    "lm1b": (_stripped, LM1B, "\n"),
    "lambada": (_passages, LAMBADA, None),
    "ag_news": (_news, (), None),
    "scientific_papers": (_articles, SCIENTIFIC_PAPERS, None),
}
