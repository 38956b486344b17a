"""`tfds:NAME[:SPLIT[:FIELD]]`: a prepared data set of TensorFlow Datasets, stored as array_record. No TensorFlow."""

import re
from collections.abc import Iterator
from pathlib import Path

from sedd.data.files import no_such
from sedd.data.source import Source
from sedd.errors import UserError
from sedd.runtime.disk import absolute

RECORDS_PER_READ = 256  # many times as fast as one by one


def open_tfds(spec: str) -> Source:
    """Returns the source of one field (default "text") of one split (default "train"), in the order of the records.

    NAME is a data set in the folder TFDS_DATA_DIR (default `~/tensorflow_datasets`), or a folder with a
    `dataset_info.json`. SPLIT may be a part, such as `train[:10%]`. UserError if there is no such data set, split or
    field, or it is not prepared, or not stored as array_record.
    """
    parts = re.fullmatch(r"tfds:([^:]+)(?::((?:[^:[]|\[[^]]*\])*))?(?::([^:]*))?", spec)
    if parts is None:
        raise UserError(f"{spec!r} names no data set; write tfds:NAME[:SPLIT[:FIELD]]")
    name, split, field = parts[1], parts[2] or "train", parts[3] or "text"
    builder = _builder(name)
    features = builder.info.features
    if field not in features:
        raise no_such(f"tfds:{name}", "field", field, features)
    try:
        records = builder.as_data_source(split)
    except ValueError as error:
        raise no_such(f"tfds:{name}", "split", split, builder.info.splits) from error
    files = tuple(sorted(Path(file) for one in builder.info.splits.values() for file in one.filepaths))
    return Source(spec, None, lambda: _documents(spec, records, field), files)


def _builder(name: str):
    """Returns the builder of a data set. UserError unless it is prepared and stored as array_record."""
    import tensorflow_datasets as tfds

    folder = Path(absolute(name))
    try:
        is_directory = (folder / "dataset_info.json").is_file()
        builder = tfds.builder_from_directory(folder) if is_directory else tfds.builder(name)
    except Exception as error:  # of many types, some with messages of many lines
        if folder.is_dir():
            raise UserError(f"{folder} holds no readable dataset_info.json; name the folder of a version") from error
        if isinstance(error, tfds.core.DatasetNotFoundError):
            raise UserError(f"tfds:{name}: no data set of that name and no such folder; correct the name") from error
        raise UserError(f"tfds:{name}: {str(error).partition(chr(10))[0]}") from error
    advice = 'prepare it with file_format="array_record"'
    if not (Path(builder.data_path) / "dataset_info.json").is_file():  # is_prepared() requires version folders
        raise UserError(f"tfds:{name} is not prepared in {builder.data_path}; {advice}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(f"tfds:{name} is stored as {builder.info.file_format.value}; {advice}")
    return builder


def _documents(spec: str, records, field: str) -> Iterator[str]:
    for start in range(0, len(records), RECORDS_PER_READ):
        rows = range(start, min(start + RECORDS_PER_READ, len(records)))
        for row, record in zip(rows, records.__getitems__(rows), strict=True):
            yield _text(record[field], f"{spec}, record {row + 1}", field)


def _text(value, where: str, field: str) -> str:
    if not isinstance(value, (bytes, str)):
        raise UserError(f"{where}: the field {field!r} is of type {type(value).__name__}, not text")
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the field {field!r} is not UTF-8 at byte {error.start}; convert it") from error
