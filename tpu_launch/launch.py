r"""Runs one command of sedd on all workers of a TPU slice, and restarts it after preemptions and failures.

    python tpu_launch/launch.py up --name=text8 --zone=us-central1-a --type=v5litepod-16 --spot --push=data/text8 \
        -- sedd train --config=experiments/text8_absorb.py --workdir=gs://BUCKET/runs/text8

`up` does the steps create, push, setup, run and watch, and may be repeated; each is also a step of its own. README.md
has a table of errors.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path, PurePosixPath

from calls import USAGE_ERROR, Calls, Failed, say
from gcloud import Gcloud
from job import Job, Source
from supervise import Ended, up

BACKENDS = {"gcloud": Gcloud}
PLATFORMS = {"JAX_PLATFORMS": "tpu,cpu"}  # so that a missing TPU is an error
STEPS = {
    "create": lambda job: job.create(),
    "push": lambda job: job.push(),
    "setup": lambda job: job.setup(),
    "run": lambda job: job.run(),
    "watch": lambda job: up(job, start=False),
    "up": up,
    "status": lambda job: job.status(),
    "logs": lambda job: job.log(job.options.worker, job.options.lines, job.options.follow),
    "stop": lambda job: job.stop(),
    "delete": lambda job: job.delete(),
}


def main(argv: list[str]) -> int:
    """Runs one step. Returns the exit status: 0, 1 after a failure, 2 for an invalid argument, 130 after Ctrl-C."""
    options = parse(argv)
    for source in getattr(options, "push", []):
        if not source.is_url and not Path(source.path).exists():
            say(f"error: --push={source.path} does not exist; gs://BUCKET/{source.path} copies it from a bucket")
            return USAGE_ERROR
    job = Job(BACKENDS[options.backend](options), Calls(options.retries, options.backoff, options.dry_run), options)
    status, ended = _run(job)
    if options.step in ("up", "watch") and not options.dry_run:
        status = max(status, _clean_up(job, ended))
    return status


def _run(job: Job) -> tuple[int, bool]:
    """Runs the step. Returns the exit status, and True if the command is known to have ended."""
    try:
        if job.options.step in ("push", "setup", "run", "logs"):
            job.check_ready()
        STEPS[job.options.step](job)
        return 0, True
    except Failed as failed:
        say(f"error: {failed}")
        return 1, isinstance(failed, Ended)
    except KeyboardInterrupt:
        return 130, False


def _clean_up(job: Job, ended: bool) -> int:
    """Deletes the machines if that was asked for; else prints that they cost money. Returns the exit status."""
    if ended and job.options.then_delete:
        try:
            job.delete()
        except Failed as failed:
            say(f"error: {failed}")
    if not job.exists:
        return 0
    places = {"name": job.name, "zone": job.options.zone, "project": job.options.project}
    flags = " ".join(f"--{flag}={shlex.quote(value)}" for flag, value in places.items() if value)
    say(f"{job.name} costs money until deleted: python tpu_launch/launch.py delete {flags}")
    return int(job.options.then_delete)


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message):
        if found := re.fullmatch(r"argument (--\w+): expected one argument", message):
            message += f"; one that begins with - is written {found[1]}=-..."
        if message.startswith("unrecognized arguments"):
            message += "; a command for the machines comes after --"
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options, with the name of the step in `step` and the words after `--` in `command`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    options = parser.parse_args(argv[:cut])
    options.command = argv[cut + 1 :]
    if options.takes_command != bool(options.command):
        end = "takes no command" if options.command else "needs a command at its end: -- sedd train --config=..."
        parser.error(f"{options.step} {end}")
    if options.takes_command:
        options.env = PLATFORMS | dict(options.env)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name, text, *parts, command=False):
        parser = steps.add_parser(name, help=text, description=text, allow_abbrev=False)
        parser.set_defaults(takes_command=command)
        for part in (_add_place, *parts):
            part(parser)
        return parser

    all_flags = (_add_machines, _add_poll, _add_ssh, _add_push, _add_setup, _add_command, _add_grace)
    for name, text in (
        ("up", "All steps, until the command is done; repeated after a preemption or a failure."),
        ("watch", "The same, from a command that runs."),
    ):
        supervised = step(name, text, *all_flags, command=True)
        supervised.add_argument(
            "--then_delete", action="store_true", help="delete the machines when the command has ended"
        )
    step("create", "Create the machines, or wait for existing ones.", _add_machines, _add_poll)
    step("push", "Copy the code and data to all workers.", _add_ssh, _add_push)
    step("setup", "Install sedd on all workers.", _add_ssh, _add_setup)
    step("run", "Start the command on all workers.", _add_ssh, _add_command, command=True)
    step("status", "Print the state of machines and workers.", _add_ssh)
    logs = step("logs", "Print the output of the workers.", _add_ssh)
    logs.add_argument("--worker", default="all", help="0, 1, ... (%(default)s)")
    logs.add_argument("--lines", type=_count, default=20, help="lines from the end of each log (%(default)s)")
    logs.add_argument("-f", "--follow", action="store_true", help="follow until Ctrl-C")
    step("stop", "End the command on all workers permanently; training saves first.", _add_ssh, _add_grace)
    step("delete", "Delete the machines.")
    return parser


def _add_place(parser):
    parser.add_argument("--name", required=True, help="name of the machines, freely chosen")
    parser.add_argument("--zone", required=True, help="Google Cloud zone")
    parser.add_argument("--project", help="Google Cloud project (gcloud's default)")
    parser.add_argument("--backend", choices=BACKENDS, default="gcloud", help="provider of machines (%(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands without running them")
    parser.add_argument("--retries", type=_count, default=5, help="of each command and of the job (%(default)s)")
    parser.add_argument(
        "--backoff", type=_seconds, default=10, help="seconds before the first retry, then doubled (%(default)s)"
    )


def _add_machines(parser):
    parser.add_argument("--type", required=True, help="accelerator type: v5litepod-16, v6e-8, v5p-32, ...")
    parser.add_argument("--runtime", help="image of the machines (by type)")
    parser.add_argument("--spot", action="store_true", help="cheaper machines that may be preempted")
    parser.add_argument(
        "--create_arg", action="append", default=[], metavar="ARG", help="extra flag, such as --reserved"
    )


def _add_poll(parser):
    parser.add_argument("--poll", type=_seconds, default=60, help="seconds between queries (%(default)s)")


def _add_ssh(parser):
    parser.add_argument(
        "--ssh_arg", action="append", default=[], metavar="ARG", help="extra flag, such as --internal-ip"
    )


def _add_push(parser):
    text = "file or folder to copy, below this one or in a bucket: data/text8, gs://BUCKET/data/text8; may be repeated"
    parser.add_argument("--push", type=_source, action="append", default=[], metavar="PATH", help=text)


def _add_setup(parser):
    parser.add_argument("--extras", default="tpu,gcs", help="extras of sedd to install (%(default)s)")
    parser.add_argument("--python", help="Python of an image that has all requirements; nothing is installed")


def _add_command(parser):
    text = f"an environment variable for the command (JAX_PLATFORMS={PLATFORMS['JAX_PLATFORMS']}); may be repeated"
    parser.add_argument("--env", type=_setting, action="append", default=[], metavar="KEY=VALUE", help=text)


def _add_grace(parser):
    parser.add_argument("--grace", type=_count, default=300, help="seconds between SIGTERM and SIGKILL (%(default)s)")


def _source(text: str) -> Source:
    place = text.partition("://")[2].partition("/")[2] if "://" in text else text
    path = PurePosixPath(place)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise argparse.ArgumentTypeError(f"{text} is neither a path below this folder nor gs://BUCKET/PATH")
    return Source(text, str(path))


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds of at least 0")
    return seconds


def _setting(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    return key, value


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for characters of a worker's log that the terminal's encoding lacks
    sys.exit(main(sys.argv[1:]))
