"""`parquet:GLOB:COLUMN`: Parquet files; one column holds the documents."""

from collections.abc import Iterator
from pathlib import Path

from sedd.data.files import no_such, open_field
from sedd.data.source import Source
from sedd.errors import UserError

ROWS_PER_READ = 64
MAX_METADATA = 2**31 - 1  # bytes and entries of the metadata; the defaults of the library are 10**8 and 10**6


def open_parquet(spec: str) -> Source:
    """Returns the source of a column of the files that match the pattern, read a few rows at a time.

    Other columns are not read. UserError if no file matches, or, while reading, a file has no such column, or a row of
    it is not text.
    """
    return open_field(spec, _documents, "COLUMN")


def _documents(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        limits = {"thrift_string_size_limit": MAX_METADATA, "thrift_container_size_limit": MAX_METADATA}
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16, **limits) as file:
            _check(path, file.schema_arrow, column)
            for batch in file.iter_batches(ROWS_PER_READ, columns=[column]):
                for text in batch.column(0):
                    row += 1
                    yield _text(text, f"{path}, row {row}", column)
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged or not a Parquet file ({first_line}); replace it") from error
    if not row:
        raise UserError(f"{path} has no rows; leave the file out")


def _check(path: Path, schema, column: str) -> None:
    """UserError unless the file has the column, and it is of text."""
    from pyarrow import types

    if column not in schema.names:
        raise no_such(str(path), "column", column, schema.names)
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
        raise UserError(f"{path}: the column {column!r} is of type {kind}, not text")


def _text(value, where: str, column: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the column {column!r} is not UTF-8; convert it") from error
    if text is None:
        raise UserError(f"{where}: the column {column!r} is null; leave the row out, or write an empty text")
    return text
