"""Helpers for tests of the launcher, which is outside the package, with a fake of the command line that it calls."""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tpu_launch"))

import calls  # noqa: F401, for test_launch: only this file finds the folder
import launch

STAND_IN = Path(__file__).parent / "stand_in"
PLACE = ["--name=tpu", "--zone=zone-a"]
MACHINES = ["--type=v5litepod-16", "--poll=0.05"]
PYTHON = """#!/bin/sh
# Answers at once a query that takes Python two seconds.
case "$2" in *import*sedd*) echo sedd 0.0 ;; *) exec {python} "$@" ;; esac
"""


class Cloud:
    """The fake cloud, in a folder of its own, and the launcher's steps with their flags."""

    def __init__(self, place):
        self.place, self.python = place, place / "image/python"

    def argv(self, step, *flags, command=()):
        machines = MACHINES if step in ("up", "watch", "create") else []
        image = [f"--python={self.python}"] if step in ("up", "watch", "setup") else []
        return [step, *PLACE, "--backoff=0.01", *machines, *image, *flags, *(["--", *command] if command else [])]

    def __call__(self, step, *flags, command=()):
        """Runs a step; returns the exit status."""
        return launch.main(self.argv(step, *flags, command=command))

    def plan(self, **plan):
        (self.place / "plan.json").write_text(json.dumps(plan))

    def calls(self, verb):
        """Returns the argument lists with this word that the fake has received."""
        lines = (self.place / "calls.jsonl").read_text().splitlines()
        return [argv for argv in map(json.loads, lines) if verb in argv]

    def num_calls(self, action):
        """Number of calls of worker.sh with this action."""
        return sum(f"worker.sh {action}" in word for argv in self.calls("ssh") for word in argv)

    def folder(self, index):
        return self.place / f"worker{index}/sedd"

    def preempt(self, number="SIGKILL"):
        subprocess.run(["gcloud", "preempt", number], check=True)


def python(code):
    """Returns a command in Python. `left` is a file that outlives the machines, `me` the worker's number."""
    start = "import os, pathlib, sys, time; me = os.environ['SEDD_PROCESS_ID']"
    return ["python", "-c", f"{start}; left = pathlib.Path('../../left' + me); {code}"]


# A first attempt runs until it is ended; a second one finds the file of the first, and is done.
TWICE = "again = left.exists(); left.touch(); print('again' if again else 'first'); time.sleep(0 if again else 60)"
# Exits with 0 on SIGTERM, as training does.
SAVES = (
    "import signal; signal.signal(signal.SIGTERM, lambda *_: (sys.stderr.write('all is saved, and the same command "
    "continues\\n'), sys.exit(0))); "
)


def eventually(condition, seconds=60):
    """Waits until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.05)
