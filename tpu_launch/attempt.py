"""Runs a command that may be interrupted; exits with status 75 if it stopped before it was complete.

    python3 tpu_launch/attempt.py sedd train --config=experiments/text8_absorb.py --workdir=gs://BUCKET/runs/text8

On SIGTERM, which announces a preemption, `sedd train` saves, prints that the same command continues, and exits with 0,
which a scheduler would take for completion. Otherwise the exit status is the command's own.
"""

import os
import signal
import subprocess
import sys

STOPPED = 75  # EX_TEMPFAIL: try again
NOT_FOUND = 127  # the status that shells use
INTERRUPTED = b"the same command continues"


def main(argv: list[str]) -> int:
    try:
        process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    except (OSError, IndexError) as error:  # IndexError: an empty command
        print(f"attempt: there is no such command: {' '.join(argv)} ({error})", file=sys.stderr)
        return NOT_FOUND
    # A machine that shuts down signals all its processes; a container signals only process 1, which forwards the
    # signal. A second signal would end sedd before it has saved.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate() if os.getpid() == 1 else None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals both processes
    tail = b""
    while output := process.stderr.read1():
        sys.stderr.buffer.write(output)
        sys.stderr.flush()
        tail = (tail + output)[-4096:]
    status = process.wait()
    if status == 0 and INTERRUPTED in tail:
        return STOPPED
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
