"""The interface of a provider of machines. `gcloud.py` implements it; another provider is a class with its methods."""

import enum
from typing import NamedTuple, Protocol


class State(enum.Enum):
    """State of all machines of a job together."""

    GONE = "does not exist"
    WAITING = "is pending"  # queued, being created, repaired or deleted: to be waited for
    READY = "is ready"
    LOST = "was preempted"  # to be deleted, because it uses quota, and created again
    FAILED = "could not be created"  # likewise, but only `--retries` times


class Status(NamedTuple):
    """A state, and the provider's own word for it."""

    state: State
    word: str


class Backend(Protocol):
    """Builds the argument lists of commands, which `Calls` runs. options: the flags of launch.py."""

    def __init__(self, options): ...

    def create(self) -> list[str]:
        """Requests the machines without waiting for them."""

    def delete(self) -> list[str]:
        """Deletes the machines in any state."""

    def queries(self) -> list[list[str]]:
        """Commands whose outputs give the state. They succeed also if the machines do not exist."""

    def parse_status(self, answers: list[str]) -> Status:
        """Returns the status that the outputs of `queries` give."""

    def ssh(self, command: str, worker: str) -> list[str]:
        """Runs a command in the home directory of worker 0, 1, ... or of "all", concurrently.

        The exit status is nonzero if that of any worker is.
        """

    def copy(self, source: str, folder: str) -> list[str]:
        """Copies a file or folder of this machine into an existing folder in the home directory of every worker."""

    def fetch(self, url: str, folder: str) -> list[str]:
        """The command by which a worker copies a folder of a bucket."""
