"""Before JAX connects its processes: all are there, or all stop with one line that names those that are not.

JAX itself ends every process without saying which one it missed. Here process 0 listens at the coordinator's address,
the others report to it, and it tells them how that went; then the port is free for JAX.
"""

import contextlib
import json
import socket
import time

from sedd.errors import UserError
from sedd.version import __version__

_GO = "go"
_PAUSE = 0.3  # seconds between tries to connect
_PATIENCE = 10  # seconds for a message that is under way


def meet(coordinator: str, count: int, index: int, timeout: float, hint: str):
    """Returns when all `count` processes are there.

    coordinator: HOST:PORT of process 0; timeout: in seconds, of this process' waiting for others; hint: how to wait
    longer, for the error.

    Raises:
      UserError: a process did not come in time, in each that did; or process 0 cannot listen, or does not answer.
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
    """As process 0: waits for the others and tells them the verdict."""
    here: dict[int, socket.socket] = {}
    refused = None
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(_listen(port))
        while len(here) < count - 1 and refused is None and time.monotonic() < deadline:
            server.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
            try:
                caller = open_sockets.enter_context(server.accept()[0])
                about = _receive(caller)
                refused = _objection(about, count, here)
                here[about["process"]] = caller
            except (OSError, ValueError, KeyError, TypeError):  # nobody yet, or somebody else who knocks at the port
                continue
        missing = [process for process in range(1, count) if process not in here]
        verdict = refused or (_GO if not missing else _missing(missing, count))
        for caller in here.values():
            with contextlib.suppress(OSError):
                caller.sendall(f"{json.dumps(verdict)}\n".encode())
        for caller in here.values():  # the others close first, so that the port is free at once
            with contextlib.suppress(OSError):
                caller.settimeout(_PATIENCE)
                caller.recv(1)
    return verdict


def _report(host: str, port: int, count: int, index: int, deadline: float) -> str | None:
    """As another process: says that it is there; the verdict, or None where process 0 cannot be reached."""
    about = {"process": index, "count": count, "version": __version__, "host": socket.gethostname()}
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_PATIENCE) as caller:
                caller.sendall(f"{json.dumps(about)}\n".encode())
                caller.settimeout(max(1.0, deadline - time.monotonic()) + _PATIENCE)
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


def _receive(caller: socket.socket, patient: bool = False) -> dict | str:
    """A line of JSON. OSError or ValueError where none comes."""
    if not patient:
        caller.settimeout(_PATIENCE)
    line = b""
    while not line.endswith(b"\n"):
        part = caller.recv(4096)
        if not part or len(line) > 65536:
            raise ValueError("no message")
        line += part
    return json.loads(line)


def _objection(about: dict, count: int, here: dict) -> str | None:
    """Why a process cannot take part."""
    who = f"process {about['process']} on {about['host']}"
    if about["count"] != count:
        return f"{who} was told of {about['count']} processes, process 0 of {count}; start all with the same number"
    if about["version"] != __version__:
        return f"{who} has sedd {about['version']}, process 0 has {__version__}; install the same on all"
    if about["process"] in here:
        return f"there are two processes {about['process']}, one on {about['host']}; give each a number of its own"
    return None


def _missing(missing: list[int], count: int) -> str:
    names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    are = "process" if len(missing) == 1 else "processes"
    return f"{are} {names} of {count} did not come; start the same command on every host"
