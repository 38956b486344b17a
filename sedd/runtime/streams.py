"""The streams of a command: results on stdout, none of which is lost, and progress on stderr, which stops nothing."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import TextIO


class Stream:
    """A text stream of which a full disk is no exception: what it cannot write is left out, and `error` says why.

    A character that its encoding lacks is replaced by "?". A pipe that nobody reads any more raises BrokenPipeError
    where `keep`. All else is that of `stream`.
    """

    def __init__(self, stream: TextIO, keep: bool):
        """keep: whether all that is written is also kept, in `written`."""
        self.stream, self.keep = stream, keep
        self.written: list[str] = []
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes the text, or what can be written of it. Returns its length."""
        if self.keep:
            self.written.append(text)
        self._try(self.stream.write, self._encodable(text))
        return len(text)

    def flush(self):
        """Flushes the stream."""
        self._try(self.stream.flush)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _try(self, action: Callable, *arguments):
        if self.error is not None:
            return
        try:
            action(*arguments)
        except BrokenPipeError as error:
            self.error = error
            if self.keep:
                raise
        except OSError as error:
            self.error = error

    def _encodable(self, text: str) -> str:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding, self.stream.errors or "strict")
            return text
        except UnicodeEncodeError:
            return text.encode(encoding, "replace").decode(encoding)


def run(program: Callable[[], int]) -> int:
    """Runs a program whose results go to sys.stdout. Returns its exit status, also where it raises SystemExit.

    Where stdout cannot be written, all results go to a file, which one line on stderr names, and the status is 2. It is
    2 at once where stdout is closed, and 0 where the reader of stdout, such as head, ends before the program.
    """
    _open_descriptors()
    before = sys.stdout, sys.stderr
    errors = sys.stderr = Stream(sys.stderr or open(os.devnull, "w"), keep=False)  # noqa: SIM115, to the end
    if sys.stdout is None:
        print("sedd: error: stdout is closed; send the results somewhere, as in > FILE", file=errors)
        sys.stderr = before[1]
        return 2
    results = sys.stdout = Stream(sys.stdout, keep=True)
    lost = None
    try:
        status = program()
        results.flush()
    except SystemExit as stopped:
        status = _status(stopped)
    except BrokenPipeError:
        status = 0
    finally:
        lost = _saved(results)
        if lost:
            print(f"sedd: error: {lost}", file=errors)
        for stream in (results, errors):
            _silence(stream)
        sys.stdout, sys.stderr = before
    return 2 if lost else status


def _status(stopped: SystemExit) -> int:
    """What the interpreter makes of it."""
    if stopped.code is None or isinstance(stopped.code, int):
        return stopped.code or 0
    print(stopped.code, file=sys.stderr)
    return 1


def _saved(results: Stream) -> str | None:
    """Saves the results that stdout did not take; what there is to say of it, or None where it took them."""
    with contextlib.suppress(BrokenPipeError):
        results.flush()
    if results.error is None or isinstance(results.error, BrokenPipeError):
        return None
    text, why = "".join(results.written), f"stdout cannot be written ({results.error.strerror})"
    for folder in (os.getcwd, tempfile.gettempdir):
        with contextlib.suppress(OSError):
            return f"{why}; the results are in {_write(text, folder())}"
    return f"{why}, nor can a file; the results are these\n{text}"


def _write(text: str, folder: str) -> str:
    """The path of a new file that holds the text. OSError, and no file, where it cannot be written."""
    descriptor, path = tempfile.mkstemp(".txt", "sedd-results-", folder)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        os.unlink(path)
        raise
    return path


def _silence(stream: Stream):
    """What a stream that failed still holds is written nowhere, or the interpreter would fail on it once more."""
    if stream.error is not None:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _open_descriptors():
    """Descriptors 0 to 2 that are closed become /dev/null's, or the next file to be opened would have their output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
