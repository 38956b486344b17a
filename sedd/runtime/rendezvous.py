"""A check before JAX connects its processes: all are present, or all raise an error that names the missing ones.

JAX itself ends every process without naming the missing one. Here process 0 listens at the coordinator's address, the
others report to it, and it sends them a verdict; then it closes the port, which JAX uses next.
"""

import contextlib
import json
import socket
import time
from typing import Any

from sedd.errors import UserError
from sedd.version import __version__

_GO = "go"
_PAUSE = 0.3  # seconds between tries to connect
_MESSAGE_TIMEOUT = 10  # seconds for a message


def meet(coordinator: str, count: int, index: int, timeout: float, hint: str):
    """Returns when all `count` processes are present. index: that of this process.

    coordinator: HOST:PORT of process 0; timeout: seconds to wait for the others; hint: for the error message, how to
    wait longer. UserError, in every process that is present, if another is missing after the timeout; also if process
    0 cannot listen or does not answer.
    """
    host, _, port = coordinator.rpartition(":")
    host, deadline = host.strip("[]"), time.monotonic() + timeout
    verdict = _gather(int(port), count, deadline) if index == 0 else _report(host, int(port), count, index, deadline)
    if verdict == _GO:
        return
    if verdict is None:
        verdict = f"process 0 at {coordinator} did not answer; start it, and open that port to the other hosts"
    raise UserError(f"{verdict} ({timeout:g} s; {hint})")


def _gather(port: int, count: int, deadline: float) -> str:
    """Process 0: waits for the others, sends them the verdict and returns it."""
    present: dict[int, socket.socket] = {}
    refused = None
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(_listen(port))
        while len(present) < count - 1 and refused is None and time.monotonic() < deadline:
            server.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
            try:
                caller = open_sockets.enter_context(server.accept()[0])
                about = _receive(caller)
                refused = _objection(about, count, present)
                present[about["process"]] = caller
            except (OSError, ValueError, KeyError, TypeError):  # no connection yet, or one of another program
                continue
        missing = [process for process in range(1, count) if process not in present]
        verdict = refused or (_GO if not missing else _missing(missing, count))
        for caller in present.values():
            with contextlib.suppress(OSError):
                caller.sendall(f"{json.dumps(verdict)}\n".encode())
        for caller in present.values():  # the others close first, so that the port is free at once
            with contextlib.suppress(OSError):
                caller.settimeout(_MESSAGE_TIMEOUT)
                caller.recv(1)
    return verdict


def _report(host: str, port: int, count: int, index: int, deadline: float) -> str | None:
    """Other processes: reports to process 0. Returns the verdict, or None if process 0 cannot be reached."""
    about = {"process": index, "count": count, "version": __version__, "host": socket.gethostname()}
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_MESSAGE_TIMEOUT) as caller:
                caller.sendall(f"{json.dumps(about)}\n".encode())
                caller.settimeout(max(1.0, deadline - time.monotonic()) + _MESSAGE_TIMEOUT)
                return str(_receive(caller, patient=True))
        except (OSError, ValueError):
            time.sleep(_PAUSE)
    return None


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=4096
        )
    except OSError as error:
        raise UserError(
            f"port {port} of this host cannot be used ({error.strerror}): another job, or one that is left over, may "
            "hold it; end that, or choose another port"
        ) from None


def _receive(caller: socket.socket, patient: bool = False) -> Any:
    """Returns the value of a JSON line. OSError or ValueError if none arrives. patient: keep the socket's timeout."""
    if not patient:
        caller.settimeout(_MESSAGE_TIMEOUT)
    line = b""
    while not line.endswith(b"\n"):
        part = caller.recv(4096)
        if not part or len(line) > 65536:
            raise ValueError("no message")
        line += part
    return json.loads(line)


def _objection(about: dict, count: int, present: dict) -> str | None:
    """Returns why a process cannot take part; None if it can."""
    who = f"process {about['process']} on {about['host']}"
    if about["count"] != count:
        return f"{who} expects {about['count']} processes, process 0 expects {count}; start all with the same number"
    if about["version"] != __version__:
        return f"{who} has sedd {about['version']}, process 0 has {__version__}; install the same on all"
    if about["process"] in present:
        return f"there are two processes {about['process']}, one on {about['host']}; give each a number of its own"
    return None


def _missing(missing: list[int], count: int) -> str:
    names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    noun = "process" if len(missing) == 1 else "processes"
    return f"{noun} {names} of {count} did not come; start the same command on every host"
