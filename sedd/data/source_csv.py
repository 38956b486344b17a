"""`csv:GLOB:COLUMN`: comma-separated values with a header; one column holds the documents."""

import csv
from collections.abc import Iterator
from pathlib import Path

from sedd.data.files import csv_rows, no_such, open_field
from sedd.data.source import Source
from sedd.errors import UserError


def open_csv(spec: str) -> Source:
    """Returns the source of a column of the files that match the pattern; quoted fields may contain newlines.

    UserError if no file matches, or, while reading, a file has no such column, or a row does not match the header.
    """
    return open_field(spec, _documents, "COLUMN")


def _documents(path: Path, column: str) -> Iterator[str]:
    rows = csv_rows(path)
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            raise UserError(f"{path} is empty: it has no header; leave the file out")
        if column not in header:
            raise no_such(f"{path}, the header", "column", column, header)
        index, empty = header.index(column), True
        for row in rows:
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {rows.line_num}: {len(row)} fields, but the header has {len(header)}; "
                    "put fields with commas or newlines in quotes"
                )
            empty = False
            yield row[index]
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}; correct the quotes") from error
    if empty:
        raise UserError(f"{path} has no rows below its header; leave the file out")
