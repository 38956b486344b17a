"""What the sources in files share: which files, what is in them as bytes and text, and where a mistake is.

Files that end in `.gz` or `.zst` are decompressed as they are read. Line ends are never translated.
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
from typing import BinaryIO

from sedd.data.source import Source
from sedd.errors import UserError

CHUNK = 2**20  # bytes read at once
LARGEST_WINDOW = 2**31  # bytes, of zstd --long=31; the library's own bound is 2**27
LARGEST_FIELD = 2**31 - 1  # characters; the library's own bound of 2**17 is for all who use it
COMPRESSED_CHUNK = 2**14  # bytes; they may hold many times their size of text


def open_files(spec: str, read: Callable[[Path], Iterator]) -> Source:
    """A source of the form `name:GLOB`: what `read` finds in each file, the end of each document marked by an id."""
    paths = matching(spec, spec.partition(":")[2])
    return Source(spec, None, lambda: (document for path in paths for document in read(path)), paths)


def open_field(spec: str, read: Callable[[Path, str], Iterator[str]], what: str = "FIELD") -> Source:
    """A source of the form `name:GLOB:FIELD`: what `read` finds in each file under what follows the last colon."""
    name, _, rest = spec.partition(":")
    pattern, _, field = rest.rpartition(":")
    if not pattern or not field:
        raise UserError(f"{spec!r} does not say which {what.lower()} holds the text; write {name}:GLOB:{what}")
    paths = matching(spec, pattern)
    return Source(spec, None, lambda: (document for path in paths for document in read(path, field)), paths)


def matching(spec: str, pattern: str) -> tuple[Path, ...]:
    """The files that match a pattern, sorted by path; `~` is the home and `**` matches folders at any depth.

    A file of exactly that name is the only one, also where its name has `[`, `?` or `*`.

    Raises:
      UserError: there are none.
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
    """The bytes of a file, decompressed.

    Raises:
      UserError: it cannot be read, or is compressed and damaged.
    """
    import zstandard

    try:
        with open(path, "rb") as file:
            if path.suffix == ".gz":
                file = gzip.GzipFile(fileobj=file)
            elif path.suffix == ".zst":
                file = _Zstandard(file)
            yield io.BufferedReader(file, CHUNK)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path} is damaged or no {path.suffix} file ({error}); replace it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


class _Zstandard(io.RawIOBase):
    """The text of the frames of a file. The library's own reader takes a file that was cut short for a whole one."""

    def __init__(self, file: BinaryIO):
        self._file, self._frame, self._input, self._output = file, None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import zstandard

        while not self._output and (self._input or self._refill()):
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
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
    """The text of a UTF-8 file as it is, a byte order mark included, a megabyte at a time.

    Raises:
      UserError: it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path) as file:
        start = 0
        while True:
            chunk = file.read(CHUNK)
            held = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise not_utf8(path, start - held + error.start) from error
            if not chunk:
                return
            start += len(chunk)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1 and their line ends; a byte order mark is none of them.

    Raises:
      UserError: it is not UTF-8.
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
    """A `csv.reader` of the rows of a UTF-8 file, whose fields may be of any size and hold newlines."""
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_FIELD))
    return csv.reader((line for _, line in numbered_lines(path)), strict=True, **dialect)


def not_utf8(path: Path, position: int) -> UserError:
    decompressed = " of its text" if path.suffix in (".gz", ".zst") else ""
    return UserError(f"{path} is not UTF-8: the byte at position {position}{decompressed} does not fit; convert it")


def no_such(where: str, what: str, name: str, names: Collection[str]) -> UserError:
    """That there is no field or column of that name, and which there are, the nearest first."""
    nearest = sorted(names, key=lambda other: -SequenceMatcher(None, name.lower(), other.lower()).ratio())
    there = ", ".join(nearest[:10]) + (", ..." if len(nearest) > 10 else "") if names else "none"
    return UserError(f"{where}: no {what} {name!r}; there are {there}")
