"""The streams of a command: results on stdout, never lost; progress on stderr, whose errors are ignored."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import TextIO


class Stream:
    """A text stream that does not raise on a full disk: text that cannot be written is dropped, and `error` is set.

    A character that its encoding lacks is replaced by "?". If `keep`, a pipe without a reader raises BrokenPipeError.
    Other attributes are those of `stream`.
    """

    def __init__(self, stream: TextIO, keep: bool):
        """keep: also append all text to the list `written`."""
        self.stream, self.keep = stream, keep
        self.written: list[str] = []
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes the text, as far as the stream accepts it. Returns the length of the text."""
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
    """Runs a program whose results go to sys.stdout. Returns its exit status, also if it raises SystemExit.

    If stdout cannot be written, all results go to a file, one line on stderr names the file, and the status is 2. If
    stdout is closed, the program does not run and the status is 2. If the reader of stdout, such as head, ends before
    the program, the status is 0.
    """
    _open_descriptors()
    before = sys.stdout, sys.stderr
    errors = sys.stderr = Stream(sys.stderr or open(os.devnull, "w"), keep=False)  # noqa: SIM115, open until the end
    if sys.stdout is None:
        print("sedd: error: stdout is closed; send the results somewhere, as in > FILE", file=errors)
        sys.stderr = before[1]
        return 2
    results = sys.stdout = Stream(sys.stdout, keep=True)
    problem = None
    try:
        status = program()
        results.flush()
    except SystemExit as stopped:
        status = _status(stopped)
    except BrokenPipeError:
        status = 0
    finally:
        problem = _save_unwritten(results)
        if problem:
            print(f"sedd: error: {problem}", file=errors)
        for stream in (results, errors):
            _silence(stream)
        sys.stdout, sys.stderr = before
    return 2 if problem else status


def _status(stopped: SystemExit) -> int:
    """Returns the exit status that the interpreter gives a SystemExit; prints its message."""
    if stopped.code is None or isinstance(stopped.code, int):
        return stopped.code or 0
    print(stopped.code, file=sys.stderr)
    return 1


def _save_unwritten(results: Stream) -> str | None:
    """Saves the results to a file if stdout failed. Returns the message for that, or None if stdout has them all."""
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
    """Writes the text to a new file and returns its path. OSError, and no file, if it cannot be written."""
    descriptor, path = tempfile.mkstemp(".txt", "sedd-results-", folder)
    try:
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        os.unlink(path)
        raise
    return path


def _silence(stream: Stream):
    """Discards what a failed stream still buffers: the interpreter would fail on it again at exit."""
    if stream.error is not None:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _open_descriptors():
    """Opens /dev/null for closed descriptors 0 to 2; else the next opened file would receive their output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
