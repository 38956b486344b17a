"""Starts the processes of a job on this machine, each with its own virtual devices and working directory."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def environment(devices=1, **more):
    """Environment variables of a process with virtual devices; the compiler's other flags are those of `conftest`."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **more}


def start(command, processes=2, devices=1, folder=None, only=None, timeout=60, **more):
    """Starts `sedd COMMAND` in a number of processes, or in those with indices `only`.

    folder: holds a working directory for each process; None: the current one.
    """
    port, started = free_port(), []
    for index in range(processes) if only is None else only:
        job = {}
        if processes > 1:
            job = {"SEDD_COORDINATOR": f"localhost:{port}", "SEDD_NUM_PROCESSES": str(processes)}
            job |= {"SEDD_PROCESS_ID": str(index), "SEDD_TIMEOUT": str(timeout)}
        directory = None if folder is None else folder / f"worker{index}"
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, *(command if command[0].endswith(".py") else ["-m", "sedd.cli", *command])]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(program, env=environment(devices, **job, **more), cwd=directory, **pipes))
    return started


def finish(started, seconds=240):
    """Waits for all processes. Returns (exit status, stdout, stderr) of each; kills those that take too long."""
    try:
        until = time.monotonic() + seconds
        texts = [process.communicate(timeout=max(1, until - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts)]


def run(command, **settings):
    """Runs a command to its end in all processes, which must succeed. Returns their standard outputs."""
    ended = finish(start(command, **settings))
    assert all(status == 0 for status, _, _ in ended), "\n".join(err[-3000:] for _, _, err in ended)
    return [out for _, out, _ in ended]


def wait_for(condition, seconds=120):
    """Waits until the condition is true; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not become true in time"
        time.sleep(0.02)
