"""The steps of a job. Each may be repeated: it does what is not done yet. `supervise.py` combines them."""

import re
import shlex
import tempfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from backend import Backend, State, Status
from calls import NOT_FOUND, REFUSED, Calls, Failed, say

ROOT = Path(__file__).resolve().parent.parent
CODE = ("sedd", "experiments", "tpu_launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
REMOTE_ROOT = "sedd"  # the folder in a worker's home directory that corresponds to ROOT
LOCK = f"{REMOTE_ROOT}/.job/lock"  # worker.sh holds it while the job runs
_ALL = "all"
_STATE = re.compile(r"worker (\S+): (\w+) ?(\d*) \| (.*)")


class Source(NamedTuple):
    """Data that is pushed besides the code: a file or folder of this machine, or a folder of a bucket."""

    path: str  # path or URL
    target: str  # path below REMOTE_ROOT on every worker

    @property
    def is_url(self) -> bool:
        return "://" in self.path

    @property
    def folder(self) -> str:
        """The folder on a worker that has to exist before the copy."""
        place = PurePosixPath(REMOTE_ROOT, self.target)
        return str(place if self.is_url else place.parent)


class Worker(NamedTuple):
    """The job on one worker. state: none, running, done, stopped, halted, failed or lost."""

    name: str
    state: str
    status: int  # exit status if failed, else 0
    last: str  # last line of the log

    def __str__(self):
        return f"worker {self.name} {self.state}" + (f" (exit status {self.status})" if self.status else "")


class Job:
    """One command on all workers of a machine or slice. options: the flags of launch.py."""

    def __init__(self, backend: Backend, calls: Calls, options):
        self.backend, self.calls, self.options, self.name = backend, calls, options, options.name
        self.code = Path(tempfile.gettempdir()) / f"sedd-{self.name}.tar.gz"
        self.packed = False
        self.exists = False  # the machines, or a request for them, existed at the last query
        self.prepared = False  # the machines have the code and its requirements

    def create(self) -> bool:
        """Waits for the machines: for existing ones, or for new ones instead of preempted or failed ones or none.

        Returns True if they are new. Failed if they cannot be created or are deleted meanwhile.
        """
        new, failures, before = False, 0, None
        while (status := self.machines()).state is not State.READY:
            if self.calls.dry_run:
                self.calls.run(self.backend.create())
                return True
            if status.word != before:
                say(f"{self.name} is {status.word}")
                before = status.word
            if status.state is State.GONE and self.exists:
                self.exists = False
                raise Failed(f"another command deleted {self.name}; up creates it again", final=True)
            if status.state is State.GONE:
                self.calls.run(self.backend.create(), is_done=lambda: self.machines().state is not State.GONE)
                new = True
            self.exists = True
            if status.state in (State.LOST, State.FAILED):
                new, failures = False, failures + (status.state is State.FAILED)
                if failures > self.options.retries:
                    raise Failed(f"{self.name} could not be created; check its zone, type and quota", final=True)
                self.delete()
            else:
                self.calls.sleep(self.options.poll)
        self.exists = True
        return new

    def check_ready(self):
        """Failed unless the machines are ready."""
        if not self.calls.dry_run and (status := self.machines()).state is not State.READY:
            raise Failed(f"{self.name} is {status.word}; create gets it ready", final=True)

    def delete(self):
        """Deletes the machines, if they exist."""
        if self.calls.dry_run or self.machines().state is not State.GONE:
            self.calls.run(self.backend.delete(), is_done=lambda: self.machines().state is State.GONE)
        self.exists = False

    def push(self):
        """Copies the code and the paths of --push, to the same relative paths. Refused while a command runs."""
        folders = {str(PurePosixPath(LOCK).parent), *(source.folder for source in self.options.push)}
        self._on_workers(["mkdir", "-p", *sorted(folders)])
        if not self.packed:  # once, so that the same code runs after a preemption
            self.calls.run(["tar", "--exclude=__pycache__", "-hczf", str(self.code), "-C", str(ROOT), *CODE])
            self.packed = True
        self.calls.run(self.backend.copy(str(self.code), REMOTE_ROOT))
        idle = ["flock", "--shared", "--nonblock", f"--conflict-exit-code={REFUSED}", LOCK]
        # Existing folders are removed first, and with them files that were deleted since.
        unpack = ["tar", "--recursive-unlink", "-xzf", f"{REMOTE_ROOT}/{self.code.name}", "-C", REMOTE_ROOT]
        self._on_workers([*idle, *unpack])
        for source in self.options.push:
            if source.is_url:
                self._on_workers(self.backend.fetch(source.path, source.folder))
            else:
                self.calls.run(self.backend.copy(source.path, source.folder))

    def setup(self):
        """Installs sedd and its requirements, the same versions on all workers."""
        python = [self.options.python] if self.options.python else []
        self._on_workers(_script("setup", self.options.extras, *python))

    def run(self):
        """Starts the command on the workers where it does not run yet. Refused if another command runs."""
        self._on_workers(_script("run", *self._command()))

    def check_same(self):
        """Refused if the last command on a worker is another one."""
        self._on_workers(_script("same", *self._command()))

    def end(self):
        """Ends the command before a restart: workers may wait for one that failed."""
        self._on_workers(_script("end", str(self.options.grace)))

    def stop(self):
        """Ends the command permanently: a watching `up` does not restart it. Training saves."""
        if not self.calls.dry_run and (status := self.machines()).state is not State.READY:
            say(f"nothing runs: {self.name} is {status.word}")
            return
        self._on_workers(_script("stop", str(self.options.grace)))

    def log(self, worker: str, lines: int, follow: bool = False):
        """Prints the end of the log of a worker, or of all workers, to stdout."""
        more = ["-F"] if follow else []
        self.calls.show(self._ssh(_script("log", str(lines), worker, *more), worker))

    def status(self):
        """Prints the state of the machines, and of the job on each worker."""
        status = self.machines()
        print(f"{self.name}: {status.word}")
        if status.state is State.READY or self.calls.dry_run:
            for worker in self.workers():
                print(f"{worker}: {worker.last}")

    def machines(self) -> Status:
        """Returns the status of the machines."""
        return self.backend.parse_status([self.calls.read(argv) for argv in self.backend.queries()])

    def workers(self) -> list[Worker]:
        """Returns the state of the job on each worker, in order; [] if nothing was pushed yet."""
        try:
            output = self.calls.read(self._ssh(_script("state"), _ALL))
        except Failed as failed:
            if failed.status == NOT_FOUND:
                return []
            raise
        workers = [Worker(name, state, int(status or 0), last) for name, state, status, last in _STATE.findall(output)]
        return sorted(workers, key=lambda worker: (len(worker.name), worker.name))

    def _command(self) -> list[str]:
        return ["env", *(f"{key}={value}" for key, value in self.options.env.items()), *self.options.command]

    def _on_workers(self, command: list[str]):
        self.calls.run(self._ssh(command, _ALL))

    def _ssh(self, command: list[str], worker: str) -> list[str]:
        """Quotes a command: ssh takes a string."""
        return self.backend.ssh(shlex.join(command), worker)


def _script(*words: str) -> list[str]:
    return ["bash", f"{REMOTE_ROOT}/tpu_launch/worker.sh", *words]
