"""Running other programs: tried again when they fail, and only printed on a dry run."""

import itertools
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

MISTAKE, REFUSED, NOT_FOUND = 2, 3, 127  # exit statuses after which trying again would not help
_LONGEST = 600  # seconds between two tries
_SILENCE = 300  # seconds after which what only asks a question counts as failed


class Failed(Exception):
    """What went wrong, in one line for a person. status: of the command that failed; final: it would fail again."""

    def __init__(self, message: str, status: int | None = None, final: bool = False):
        super().__init__(message)
        self.status, self.final = status, final


def say(message: str):
    """Progress, on stderr; stdout is for results."""
    print(f"launch: {message}", file=sys.stderr, flush=True)


class Calls:
    """How commands are run. retries: of each; backoff: seconds before the first of them, doubled before each other."""

    def __init__(self, retries: int, backoff: float, dry_run: bool):
        self.retries, self.backoff, self.dry_run = retries, backoff, dry_run

    def run(self, argv: list[str], enough: Callable[[], bool] = lambda: False):
        """Until it succeeds, or has done enough though it failed; what it prints goes to stderr. Failed, if neither."""
        self._tried(argv, enough, stdout=sys.stderr)

    def read(self, argv: list[str]) -> str:
        """Its stdout; nothing on a dry run."""
        pipe = subprocess.PIPE
        silent = dict(stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, timeout=_SILENCE)
        return self._tried(argv, lambda: False, **silent)

    def show(self, argv: list[str]):
        """Once, as it is."""
        if self.dry_run:
            print(shlex.join(argv), flush=True)
        else:
            _once(argv)

    def pause(self, number: int):
        """Longer each time. number: of the failures so far."""
        seconds = min(_LONGEST, self.backoff * 2 ** (number - 1))
        say(f"again in {seconds:.0f} s ({number} of {self.retries})")
        self.sleep(seconds)

    def sleep(self, seconds: float):
        if not self.dry_run:
            time.sleep(seconds)

    def _tried(self, argv: list[str], enough: Callable[[], bool], **how) -> str:
        if self.dry_run:
            print(shlex.join(argv), flush=True)
            return ""
        for number in itertools.count(1):
            try:
                return _once(argv, **how)
            except Failed as failed:
                if failed.final:
                    raise
                if enough():
                    return ""
                if number > self.retries:
                    raise
                say(str(failed))
            self.pause(number)


def _once(argv: list[str], **how) -> str:
    shown = shlex.join(argv)
    try:
        done = subprocess.run(argv, encoding="utf-8", errors="replace", **how)
    except FileNotFoundError:
        raise Failed(f"there is no {argv[0]} on the PATH; install it", NOT_FOUND, final=True) from None
    except subprocess.TimeoutExpired:
        raise Failed(f"no answer in {_SILENCE} s: {shown}") from None
    status = done.returncode
    if status == 0:
        return done.stdout
    last = (done.stderr or "").strip().splitlines()[-1:]
    message = ": ".join([f"exit status {status} of {shown}", *last])
    raise Failed(message, status, final=status in (MISTAKE, REFUSED, NOT_FOUND))
