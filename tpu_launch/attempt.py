"""Runs a command that may be told to stop, and ends with status 75 if it stopped before its end.

    python3 tpu_launch/attempt.py sedd train --config=experiments/text8_absorb.py --workdir=gs://BUCKET/runs/text8

On SIGTERM, which announces a preemption, `sedd train` saves, says that the same command continues, and exits with 0,
which a scheduler would take for the end of the work. Else the exit status is the command's own.
"""

import os
import signal
import subprocess
import sys

STOPPED = 75  # EX_TEMPFAIL: try again
NOT_FOUND = 127  # as a shell has it
SAID = b"the same command continues"


def main(argv: list[str]) -> int:
    try:
        process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    except (OSError, IndexError) as error:  # of an empty command
        print(f"attempt: there is no such command: {' '.join(argv)} ({error})", file=sys.stderr)
        return NOT_FOUND
    # All processes of a machine that goes down are told; of a container only the first one is, and passes it on. A
    # second signal would end sedd before it has saved.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate() if os.getpid() == 1 else None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells both
    end = b""
    while said := process.stderr.read1():
        sys.stderr.buffer.write(said)
        sys.stderr.flush()
        end = (end + said)[-4096:]
    status = process.wait()
    if status == 0 and SAID in end:
        return STOPPED
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
