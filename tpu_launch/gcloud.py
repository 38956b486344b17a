"""Cloud TPU virtual machines through Google's command line: queued resources of one node, a slice of any size.

All calls of `gcloud` are here. Google maintains this interface with fixes only, without TPUs later than v6e.
"""

from backend import State, Status

# Image by the prefix of `--type`; other types take the general image.
RUNTIMES = {"v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
GENERAL_RUNTIME = "tpu-ubuntu2204-base"

# States of a queued resource, then of a node. All others are WAITING.
STATES = {
    "ACTIVE": State.READY,
    "SUSPENDED": State.LOST,
    "FAILED": State.FAILED,
    "READY": State.READY,
    "PREEMPTED": State.LOST,
    "TERMINATED": State.LOST,
    "UNKNOWN": State.LOST,  # after a failed repair
}
ALIVE = "ServerAliveInterval=30"  # seconds; a connection to a machine that no longer exists ends after three


class Gcloud:
    """The queued resource `--name` and its node of the same name."""

    def __init__(self, options):
        self.options = options
        self.place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]

    def create(self) -> list[str]:
        name, kind = self.options.name, self.options.type
        runtime = self.options.runtime or RUNTIMES.get(kind.partition("-")[0], GENERAL_RUNTIME)
        return [
            *("gcloud", "compute", "tpus", "queued-resources", "create", name, f"--node-id={name}", *self.place),
            *(f"--accelerator-type={kind}", f"--runtime-version={runtime}"),
            *(["--spot"] if self.options.spot else []),
            *(*self.options.create_arg, "--async", "--quiet"),
        ]

    def delete(self) -> list[str]:
        name = self.options.name
        return ["gcloud", "compute", "tpus", "queued-resources", "delete", name, *self.place, "--force", "--quiet"]

    def queries(self) -> list[list[str]]:
        # `list` succeeds if a resource does not exist, and fails if the query does.
        return [
            ["gcloud", "compute", "tpus", kind, "list", *self.place, f"--format=value(name.basename(),{state})"]
            for kind, state in (("queued-resources", "state.state"), ("tpu-vm", "state"))
        ]

    def parse_status(self, answers: list[str]) -> Status:
        resource, node = (dict(line.split("\t") for line in answer.splitlines()) for answer in answers)
        word = resource.get(self.options.name)
        if word is None:
            return Status(State.GONE, "not created")
        state = STATES.get(word, State.WAITING)
        if state is State.READY:  # a node may be lost before its resource is suspended
            word = node.get(self.options.name, "TERMINATED")
            state = STATES.get(word, State.WAITING)
        return Status(state, word)

    def ssh(self, command: str, worker: str) -> list[str]:
        return [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", self.options.name, *self.place, f"--worker={worker}"),
            *("--quiet", *self.options.ssh_arg, f"--ssh-flag=-o{ALIVE}", f"--command={command}"),
        ]

    def copy(self, source: str, folder: str) -> list[str]:
        return [
            *("gcloud", "compute", "tpus", "tpu-vm", "scp", source, f"{self.options.name}:{folder}/", *self.place),
            *("--worker=all", "--quiet", *self.options.ssh_arg, f"--scp-flag=-o{ALIVE}", "--recurse"),
        ]

    def fetch(self, url: str, folder: str) -> list[str]:
        return ["gcloud", "storage", "rsync", url, folder, "--recursive"]
