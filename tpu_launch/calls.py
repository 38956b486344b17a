"""Runs other programs, with retries; a dry run prints them instead."""

import itertools
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

USAGE_ERROR, REFUSED, NOT_FOUND = 2, 3, 127  # exit statuses for which a retry cannot help
_MAX_PAUSE = 600  # seconds between two tries
_QUERY_TIMEOUT = 300  # seconds


class Failed(Exception):
    """An error, as one line. status: exit status of the command that failed; final: a retry would fail too."""

    def __init__(self, message: str, status: int | None = None, final: bool = False):
        super().__init__(message)
        self.status, self.final = status, final


def say(message: str):
    """Prints progress to stderr; stdout is for results."""
    print(f"launch: {message}", file=sys.stderr, flush=True)


class Calls:
    """Runs commands. retries: number for each command; backoff: seconds before the first retry, then doubled."""

    def __init__(self, retries: int, backoff: float, dry_run: bool):
        self.retries, self.backoff, self.dry_run = retries, backoff, dry_run

    def run(self, argv: list[str], is_done: Callable[[], bool] = lambda: False):
        """Runs a command, with its output on stderr, until it succeeds or, after a failure, `is_done()` holds.

        Failed if the retries are used up.
        """
        self._with_retries(argv, is_done, stdout=sys.stderr)

    def read(self, argv: list[str]) -> str:
        """Runs a command and returns its stdout; "" on a dry run."""
        pipe = subprocess.PIPE
        captured = dict(stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, timeout=_QUERY_TIMEOUT)
        return self._with_retries(argv, lambda: False, **captured)

    def show(self, argv: list[str]):
        """Runs a command once, with its output unchanged."""
        if self.dry_run:
            print(shlex.join(argv), flush=True)
        else:
            _once(argv)

    def pause(self, number: int):
        """Waits, longer after each failure. number: failures so far."""
        seconds = min(_MAX_PAUSE, self.backoff * 2 ** (number - 1))
        say(f"retrying in {seconds:.0f} s ({number} of {self.retries})")
        self.sleep(seconds)

    def sleep(self, seconds: float):
        if not self.dry_run:
            time.sleep(seconds)

    def _with_retries(self, argv: list[str], is_done: Callable[[], bool], **settings) -> str:
        if self.dry_run:
            print(shlex.join(argv), flush=True)
            return ""
        for number in itertools.count(1):
            try:
                return _once(argv, **settings)
            except Failed as failed:
                if failed.final:
                    raise
                if is_done():
                    return ""
                if number > self.retries:
                    raise
                say(str(failed))
            self.pause(number)


def _once(argv: list[str], **settings) -> str:
    command = shlex.join(argv)
    try:
        done = subprocess.run(argv, encoding="utf-8", errors="replace", **settings)
    except FileNotFoundError:
        raise Failed(f"there is no {argv[0]} on the PATH; install it", NOT_FOUND, final=True) from None
    except subprocess.TimeoutExpired:
        raise Failed(f"no answer in {_QUERY_TIMEOUT} s: {command}") from None
    status = done.returncode
    if status == 0:
        return done.stdout
    last = (done.stderr or "").strip().splitlines()[-1:]
    message = ": ".join([f"exit status {status} of {command}", *last])
    raise Failed(message, status, final=status in (USAGE_ERROR, REFUSED, NOT_FOUND))
