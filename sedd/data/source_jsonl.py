"""`jsonl:GLOB:FIELD`: a JSON object in each line; one field holds the documents."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sedd.data.files import no_such, numbered_lines, open_field
from sedd.data.source import Source
from sedd.errors import UserError

_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)  # integers are unused, and Python refuses 4,300 digits


def open_jsonl(spec: str) -> Source:
    """Returns the source of a field of each line of the files that match the pattern; blank lines are skipped.

    UserError if no file matches, or, while reading, a line is not a JSON object with text in that field.
    """
    return open_field(spec, _documents)


def json_fields(path: Path, field: str, advice: str = "correct it") -> Iterator[tuple[str, str, Any]]:
    """Yields (file and number of the line, the line, value of the field) of each line; blank lines are skipped.

    UserError if a line is not JSON (the error ends with the advice), not an object, or has no such field.
    """
    for number, line in numbered_lines(path):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); {advice}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object with fields, but of type {type(row).__name__}")
        if field not in row:
            raise no_such(where, "field", field, row)
        yield where, line, row[field]


def _documents(path: Path, field: str) -> Iterator[str]:
    empty = True
    for where, line, text in json_fields(path, field):
        empty = False
        if text is None:
            raise UserError(f"{where}: the field {field!r} is null; leave the row out, or write an empty text")
        if not isinstance(text, str):
            raise UserError(f"{where}: the field {field!r} is of type {type(text).__name__}, not text")
        if "\\u" in line:  # JSON's only way to write half of a surrogate pair
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{where}: the field {field!r} contains {error.object[error.start]!a}, not a character; correct it"
                ) from error
        yield text
    if empty:
        raise UserError(f"{path} has no lines; leave the file out")
