"""What launching needs of a place that has machines. `gcloud.py` has one; another is a class with its methods."""

import enum
from typing import NamedTuple, Protocol


class State(enum.Enum):
    """Of all machines of a job together."""

    GONE = "is not there"
    WAITING = "is on its way"  # in the queue, being made, repaired or deleted: to be waited for
    READY = "is ready"
    LOST = "was taken away"  # preempted: to be deleted, since it eats quota, and made anew
    FAILED = "could not be had"  # likewise, but not for ever


class Seen(NamedTuple):
    """A state, and the place's own word for it."""

    state: State
    word: str


class Backend(Protocol):
    """Argument lists of commands, which others run; `options` are what the flags of launch.py say."""

    def __init__(self, options): ...

    def create(self) -> list[str]:
        """Asks for the machines, and returns at once."""

    def delete(self) -> list[str]:
        """Deletes them, in whatever state they are."""

    def queries(self) -> list[list[str]]:
        """Commands whose outputs tell the state; that the machines are not there is no error."""

    def seen(self, answers: list[str]) -> Seen:
        """What the outputs of `queries` say."""

    def ssh(self, command: str, worker: str) -> list[str]:
        """Runs a command in the home directory of worker 0, 1, ... or of "all", at the same time.

        Its exit status is not 0 if that of any worker is not.
        """

    def copy(self, source: str, folder: str) -> list[str]:
        """Copies a file or folder of this machine into a folder, which is there, in the home of every worker."""

    def fetch(self, url: str, folder: str) -> list[str]:
        """What a worker runs to copy a folder of a bucket."""
