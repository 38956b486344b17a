"""The steps of a job, each of which may be repeated: it does what is not done yet. `keep.py` puts them together."""

import re
import shlex
import tempfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from backend import Backend, Seen, State
from calls import NOT_FOUND, REFUSED, Calls, Failed, say

ROOT = Path(__file__).resolve().parent.parent
CODE = ("sedd", "experiments", "tpu_launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
THERE = "sedd"  # the folder in a worker's home directory that becomes what ROOT is here
LOCK = f"{THERE}/.job/lock"  # worker.sh holds it while the job runs
_ALL = "all"
_STATE = re.compile(r"worker (\S+): (\w+) ?(\d*) \| (.*)")


class Source(NamedTuple):
    """What is pushed besides the code: a file or folder of this machine, or a folder of a bucket."""

    here: str  # its path or URL
    there: str  # the same path, below THERE on every worker

    @property
    def remote(self) -> bool:
        return "://" in self.here

    @property
    def folder(self) -> str:
        """The folder that has to be there first."""
        place = PurePosixPath(THERE, self.there)
        return str(place if self.remote else place.parent)


class Worker(NamedTuple):
    """What a worker says of the job. state: none, running, done, stopped, halted, failed or lost."""

    name: str
    state: str
    status: int  # the exit status of one that failed, or 0
    last: str  # line of its log

    def __str__(self):
        return f"worker {self.name} {self.state}" + (f" (exit status {self.status})" if self.status else "")


class Job:
    """One command on all workers of a machine or slice. options: what the flags of launch.py say."""

    def __init__(self, backend: Backend, calls: Calls, options):
        self.backend, self.calls, self.options, self.name = backend, calls, options, options.name
        self.code = Path(tempfile.gettempdir()) / f"sedd-{self.name}.tar.gz"
        self.packed = False
        self.there = False  # whether the machines, or a request for them, were there when last heard of
        self.prepared = False  # whether they have the code and what it needs

    def create(self) -> bool:
        """Waits for the machines: for those that are there, or for new ones in place of dead ones or none.

        Returns whether they are new. Failed, if they cannot be had, or somebody deletes them meanwhile.
        """
        new, failures, before = False, 0, None
        while (seen := self.seen()).state is not State.READY:
            if self.calls.dry_run:
                self.calls.run(self.backend.create())
                return True
            if seen.word != before:
                say(f"{self.name} is {seen.word}")
                before = seen.word
            if seen.state is State.GONE and self.there:
                self.there = False
                raise Failed(f"somebody deleted {self.name}; up makes it again", final=True)
            if seen.state is State.GONE:
                self.calls.run(self.backend.create(), enough=lambda: self.seen().state is not State.GONE)
                new = True
            self.there = True
            if seen.state in (State.LOST, State.FAILED):
                new, failures = False, failures + (seen.state is State.FAILED)
                if failures > self.options.retries:
                    raise Failed(f"{self.name} could not be had; see its zone, its type and the quota", final=True)
                self.delete()
            else:
                self.calls.sleep(self.options.poll)
        self.there = True
        return new

    def check_ready(self):
        """Failed, unless the machines are."""
        if not self.calls.dry_run and (seen := self.seen()).state is not State.READY:
            raise Failed(f"{self.name} is {seen.word}; create gets it ready", final=True)

    def delete(self):
        """Deletes the machines; that they are gone is fine."""
        if self.calls.dry_run or self.seen().state is not State.GONE:
            self.calls.run(self.backend.delete(), enough=lambda: self.seen().state is State.GONE)
        self.there = False

    def push(self):
        """Copies the code, and what --push names, to where it lies here. Refused while a command runs."""
        folders = {str(PurePosixPath(LOCK).parent), *(source.folder for source in self.options.push)}
        self._on_workers(["mkdir", "-p", *sorted(folders)])
        if not self.packed:  # only once: what runs after a preemption is what ran before
            self.calls.run(["tar", "--exclude=__pycache__", "-hczf", str(self.code), "-C", str(ROOT), *CODE])
            self.packed = True
        self.calls.run(self.backend.copy(str(self.code), THERE))
        idle = ["flock", "--shared", "--nonblock", f"--conflict-exit-code={REFUSED}", LOCK]
        # Old folders go first, and with them the files that are no longer in them.
        unpack = ["tar", "--recursive-unlink", "-xzf", f"{THERE}/{self.code.name}", "-C", THERE]
        self._on_workers([*idle, *unpack])
        for source in self.options.push:
            if source.remote:
                self._on_workers(self.backend.fetch(source.here, source.folder))
            else:
                self.calls.run(self.backend.copy(source.here, source.folder))

    def setup(self):
        """Installs sedd and what it needs, the same versions everywhere."""
        python = [self.options.python] if self.options.python else []
        self._on_workers(_script("setup", self.options.extras, *python))

    def run(self):
        """Starts the command; where it runs already that is fine. Refused where another one runs."""
        self._on_workers(_script("run", *self._command()))

    def check_same(self):
        """Refused if another command is there."""
        self._on_workers(_script("same", *self._command()))

    def end(self):
        """Ends what runs, to start it again: workers may wait for one that failed."""
        self._on_workers(_script("end", str(self.options.grace)))

    def stop(self):
        """Ends what runs, for good: `up`, if it watches, does not start it again. Training saves."""
        if not self.calls.dry_run and (seen := self.seen()).state is not State.READY:
            say(f"nothing runs: {self.name} is {seen.word}")
            return
        self._on_workers(_script("stop", str(self.options.grace)))

    def log(self, worker: str, lines: int, follow: bool = False):
        """Shows the end of a worker's log, or of all, on stdout."""
        more = ["-F"] if follow else []
        self.calls.show(self._ssh(_script("log", str(lines), worker, *more), worker))

    def status(self):
        """Prints the state of the machines, and of the job on each worker."""
        seen = self.seen()
        print(f"{self.name}: {seen.word}")
        if seen.state is State.READY or self.calls.dry_run:
            for worker in self.workers():
                print(f"{worker}: {worker.last}")

    def seen(self) -> Seen:
        """The state of the machines."""
        return self.backend.seen([self.calls.read(argv) for argv in self.backend.queries()])

    def workers(self) -> list[Worker]:
        """What each says, in their order; none where nothing was pushed yet."""
        try:
            said = self.calls.read(self._ssh(_script("state"), _ALL))
        except Failed as failed:
            if failed.status == NOT_FOUND:
                return []
            raise
        found = [Worker(name, state, int(status or 0), last) for name, state, status, last in _STATE.findall(said)]
        return sorted(found, key=lambda worker: (len(worker.name), worker.name))

    def _command(self) -> list[str]:
        return ["env", *(f"{key}={value}" for key, value in self.options.env.items()), *self.options.command]

    def _on_workers(self, command: list[str]):
        self.calls.run(self._ssh(command, _ALL))

    def _ssh(self, command: list[str], worker: str) -> list[str]:
        """The one place where a command becomes a string, since that is all that ssh takes."""
        return self.backend.ssh(shlex.join(command), worker)


def _script(*words: str) -> list[str]:
    return ["bash", f"{THERE}/tpu_launch/worker.sh", *words]
