"""Several processes of one job on this machine, each with its own virtual devices and a folder of its own."""

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
    """Of a process with so many virtual devices; nothing is optimised, as in `conftest`."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **more}


def start(command, processes=2, devices=1, folder=None, only=None, timeout=60, **more):
    """Starts `sedd COMMAND` in so many processes, or only those told; each in a folder of its own, if there is one."""
    port, started = free_port(), []
    for index in range(processes) if only is None else only:
        told = {"SEDD_COORDINATOR": f"localhost:{port}", "SEDD_NUM_PROCESSES": str(processes)}
        told |= {"SEDD_PROCESS_ID": str(index), "SEDD_TIMEOUT": str(timeout)} if processes > 1 else {}
        place = None if folder is None else folder / f"worker{index}"
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, *(command if command[0].endswith(".py") else ["-m", "sedd.cli", *command])]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        env = environment(devices, **(told if processes > 1 else {}), **more)
        started.append(subprocess.Popen(program, env=env, cwd=place, **pipes))
    return started


def finish(started, seconds=240):
    """Waits for all; (exit status, stdout, stderr) of each."""
    try:
        until = time.monotonic() + seconds
        texts = [process.communicate(timeout=max(1, until - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts)]


def run(command, **settings):
    """Runs it to its end in all processes, which have to succeed; their outputs."""
    ended = finish(start(command, **settings))
    assert all(status == 0 for status, _, _ in ended), "\n".join(err[-3000:] for _, _, err in ended)
    return [out for _, out, _ in ended]


def wait_for(condition, seconds=120):
    """Until it holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)
