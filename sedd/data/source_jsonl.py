"""`jsonl:GLOB:FIELD`: a JSON object in each line, a document in one of its fields."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sedd.data.files import no_such, numbered_lines, open_field
from sedd.data.source import Source
from sedd.errors import UserError

_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)  # of no use here, and Python refuses those of 4,300 digits


def open_jsonl(spec: str) -> Source:
    """That field of each line of the files that match the pattern; blank lines are skipped.

    Raises:
      UserError: no file matches, or, while reading, a line is no JSON object or has no text in that field.
    """
    return open_field(spec, _documents)


def json_fields(path: Path, field: str, advice: str = "mend it") -> Iterator[tuple[str, str, Any]]:
    """That field of the JSON object in each line: where the line is, the line, and the value; blank ones are skipped.

    Raises:
      UserError: a line is no JSON (what to do then is the advice), no object, or has no such field.
    """
    for number, line in numbered_lines(path):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({error}); {advice}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object with fields, but a {type(row).__name__}")
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
            raise UserError(f"{where}: the field {field!r} holds no text, but a {type(text).__name__}")
        if "\\u" in line:  # the only way to write half a character
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{where}: the field {field!r} holds {error.object[error.start]!a}, no character"
                ) from error
        yield text
    if empty:
        raise UserError(f"{path} has no lines; leave the file out")
