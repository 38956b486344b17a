"""Shared code of the sources that read files: glob patterns, decompression, decoding and error positions.

Files whose names end in `.gz` or `.zst` are decompressed as they are read. Line ends are never translated.
"""

import codecs
import csv
import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, BinaryIO

from sedd.data.source import Source
from sedd.errors import UserError

CHUNK = 2**20  # bytes read at once
MAX_WINDOW = 2**31  # bytes, that of zstd --long=31; the default of the library is 2**27
MAX_FIELD = 2**31 - 1  # characters; the default of the library is 2**17, a setting of the process
COMPRESSED_CHUNK = 2**14  # bytes; they may decompress to many times their size


def open_files(spec: str, read: Callable[[Path], Iterator]) -> Source:
    """Returns the source `name:GLOB`: the documents that `read` yields from each file, each ended by an id."""
    paths = matching(spec, spec.partition(":")[2])
    return Source(spec, None, lambda: (document for path in paths for document in read(path)), paths)


def open_field(spec: str, read: Callable[[Path, str], Iterator[str]], what: str = "FIELD") -> Source:
    """Returns the source `name:GLOB:FIELD`: the documents that `read` yields from that field of each file.

    what: "FIELD" or "COLUMN", the word of the error messages. UserError if the pattern or the field is missing.
    """
    name, _, rest = spec.partition(":")
    pattern, _, field = rest.rpartition(":")
    if not pattern or not field:
        raise UserError(f"{spec!r} does not say which {what.lower()} holds the text; write {name}:GLOB:{what}")
    paths = matching(spec, pattern)
    return Source(spec, None, lambda: (document for path in paths for document in read(path, field)), paths)


def matching(spec: str, pattern: str) -> tuple[Path, ...]:
    """Returns the files that match a pattern, sorted by path; `~` is the home, `**` matches folders at any depth.

    If a file has exactly that name, also one with `[`, `?` or `*`, it is the only match. UserError if none match.
    """
    pattern = os.path.expanduser(pattern)
    names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted({path for path in map(Path, names) if path.is_file()})
    if not paths:
        kind = spec.partition(":")[0]
        raise UserError(f"no file matches {pattern!r} (seen from {Path.cwd()}); change the pattern after '{kind}:'")
    return tuple(paths)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading decompressed bytes. UserError if it cannot be read, or is compressed and damaged."""
    import zstandard

    try:
        with open(path, "rb") as file:
            raw: Any = file
            if path.suffix == ".gz":
                raw = gzip.GzipFile(fileobj=file)
            elif path.suffix == ".zst":
                raw = _Zstandard(file)
            yield io.BufferedReader(raw, CHUNK)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path} is damaged or not a {path.suffix} file ({error}); replace it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


class _Zstandard(io.RawIOBase):
    """Decompresses all frames of a file. Unlike the library's own reader, it raises EOFError for a truncated file."""

    def __init__(self, file: BinaryIO):
        self._file, self._input, self._output = file, b"", memoryview(b"")
        self._frame: Any = None  # decompresses the current frame; None between frames

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import zstandard

        while not self._output and (self._input or self._refill()):
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._frame, self._input = None, self._frame.unused_data
        if not self._output and self._frame is not None:
            raise EOFError("it ends in the middle of a frame")
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _refill(self) -> bytes:
        self._input = self._file.read(COMPRESSED_CHUNK)
        return self._input


def text_parts(path: Path) -> Iterator[str]:
    """Yields the text of a UTF-8 file unchanged, a byte order mark included, 1 MiB at a time.

    UserError if it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path) as file:
        start = 0
        while True:
            chunk = file.read(CHUNK)
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the last chunk
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise not_utf8(path, start - pending + error.start) from error
            if not chunk:
                return
            start += len(chunk)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line with its line end) of a UTF-8 file, without a byte order mark.

    UserError if it is not UTF-8.
    """
    with opened(path) as file:
        start = 0
        for number, line in enumerate(file, 1):
            skipped = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            try:
                yield number, line[skipped:].decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(path, start + skipped + error.start) from error
            start += len(line)


def csv_rows(path: Path, **dialect):
    """Returns a `csv.reader` of a UTF-8 file. Fields may be of any size and contain newlines."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))
    return csv.reader((line for _, line in numbered_lines(path)), strict=True, **dialect)


def not_utf8(path: Path, position: int) -> UserError:
    """Returns the error for a file that is not UTF-8 at that byte of its (decompressed) content."""
    decompressed = " of its text" if path.suffix in (".gz", ".zst") else ""
    return UserError(f"{path} is not UTF-8: the byte at position {position}{decompressed} is invalid; convert it")


def no_such(where: str, what: str, name: str, names: Collection[str]) -> UserError:
    """Returns the error for a name that does not exist, with up to ten of those that do, the most similar first."""
    nearest = sorted(names, key=lambda other: -SequenceMatcher(None, name.lower(), other.lower()).ratio())
    existing = ", ".join(nearest[:10]) + (", ..." if len(nearest) > 10 else "") if names else "none"
    return UserError(f"{where}: no {what} {name!r}; there are {existing}")
