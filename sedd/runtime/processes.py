"""Several processes of one job: how they find one another, agree, and go down together.

Every process runs the same command. Process 0 writes files and prints results; all of them compute.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd.errors import UserError
from sedd.runtime.rendezvous import meet
from sedd.version import __version__

COORDINATOR, PROCESSES, PROCESS = "SEDD_COORDINATOR", "SEDD_NUM_PROCESSES", "SEDD_PROCESS_ID"
TIMEOUT = "SEDD_TIMEOUT"  # seconds to wait for the other processes
_DEFAULT_TIMEOUT = 300
_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead, and the job ends
_FAILED = "sedd/failed"  # the key under which a process says that it failed, and why
_LOOK = 1.0  # seconds between looks at that key
_SAID = 512  # bytes of a message that processes agree on


class Job(NamedTuple):
    """Where this process stands among those of its job. devices: its own, where the cluster gives each some."""

    coordinator: str  # HOST:PORT, of process 0
    count: int
    index: int
    devices: list[int] | None = None


def initialize():
    """Joins the other processes of the job, looks at the devices, and says what is there. Once, before any other use
    of JAX; a second call does nothing.

    The processes are those of SEDD_COORDINATOR (HOST:PORT of process 0), SEDD_NUM_PROCESSES and SEDD_PROCESS_ID; else
    those that the cluster knows of (TPU metadata, Slurm, Open MPI, Kubernetes); else there is one.

    Raises:
      UserError: a process did not come within SEDD_TIMEOUT seconds (300), runs another version or sees other kinds of
        devices; or there is an accelerator, and JAX does not see it.
    """
    if getattr(initialize, "done", False):
        return
    job = _told() or _detected()
    if job is not None and job.count > 1 and not jax.distributed.is_initialized():
        timeout = _number(TIMEOUT, _DEFAULT_TIMEOUT)
        meet(job.coordinator, job.count, job.index, timeout, hint=f"{TIMEOUT}=SECONDS waits longer")
        with contextlib.suppress(AttributeError):  # it would take SIGTERM, which `fit` does
            jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                job.coordinator,
                job.count,
                job.index,
                job.devices,
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=_HEARTBEAT,
            )
        except RuntimeError as error:
            raise UserError(f"sedd.initialize() has to come before any other use of JAX ({error})") from None
    _look_at_devices()
    _keep_compiled()
    if are_many():
        sys.excepthook = _excepthook
        threading.Thread(target=_watch, name="watch", daemon=True).start()
        check_same("version", f"sedd {__version__}, jax {jax.__version__}")
        check_same("kind of devices", jax.local_devices()[0].device_kind)
    initialize.done = True


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def are_many() -> bool:
    """Whether there are other processes. Touches no device where there are none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first_problem(problem: str | None) -> str | None:
    """The first problem that any process has, the same in all of them; None where none has one.

    It names the process, where there are several. All processes have to call it.
    """
    if not are_many():
        return problem
    said = f"process {jax.process_index()} ({socket.gethostname()}): {problem}" if problem else ""
    return next(filter(None, gathered(said)), None)


def gathered(text: str) -> list[str]:
    """What each process says, in their order; the first 512 bytes of each. All processes have to call it."""
    if not are_many():
        return [text]
    from jax.experimental import multihost_utils

    padded = np.frombuffer(text.encode()[:_SAID].ljust(_SAID, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def broadcast_from_first(value):
    """What process 0 has, of numbers, texts, lists and dictionaries of these. All processes have to call it."""
    told = broadcast_array_from_first(np.frombuffer(json.dumps(value).encode(), np.uint8))
    return json.loads(told.tobytes())


def broadcast_array_from_first(array: np.ndarray) -> np.ndarray:
    """The array that process 0 has; those of the others may differ along the first axis. All have to call it."""
    if not are_many():
        return array
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(array))))
    told = array if is_first() else np.zeros((size, *array.shape[1:]), array.dtype)
    return np.asarray(multihost_utils.broadcast_one_to_all(told))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which a UserError of one process becomes one of all, so that none waits for another in vain."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise UserError(problem)


def check_same(what: str, value: str):
    """UserError, naming the process, unless all processes have the same value. All have to call it."""
    values = gathered(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"process {index} has another {what} than process 0: {other}, not {values[0]}")


def any_of(flag: bool) -> jax.Array | bool:
    """Whether any process says so; to be read later, when the devices have done what they were given before.

    All processes have to call it, equally often.
    """
    if not are_many():
        return flag
    rows, reduce = _reduction()
    told = np.full(jax.local_device_count(), flag)
    return reduce(jax.make_array_from_process_local_data(rows, told, (jax.device_count(),)))


def abort_job(status: int, reason: str):
    """Where there are other processes: tells them, and ends this one at once with the status; they end too.

    That takes seconds, whatever they wait for; without it they would wait for minutes for a process that is gone.
    """
    if not are_many():
        return
    with contextlib.suppress(Exception):
        _client().key_value_set(_FAILED, f"process {jax.process_index()} ({socket.gethostname()}): {reason}")
        if is_first():  # the others ask this process
            time.sleep(3 * _LOOK)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _told() -> Job | None:
    """What the environment says explicitly."""
    names = (COORDINATOR, PROCESSES, PROCESS)
    missing = [name for name in names if not os.environ.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(f"{', '.join(names)} go together; {missing[0]} is not set")
    host, _, port = os.environ[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{COORDINATOR} must be HOST:PORT of process 0, not {os.environ[COORDINATOR]!r}")
    count, index = _number(PROCESSES), _number(PROCESS)
    if not 0 <= index < count:
        raise UserError(f"{PROCESS} must be 0 .. {count - 1} of {PROCESSES}={count}, not {index}")
    return Job(os.environ[COORDINATOR], count, index)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _detected() -> Job | None:
    """What JAX finds out from the cluster; as `jax.distributed.initialize` would, but before it waits."""
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, _DEFAULT_TIMEOUT)
    coordinator, count, index, devices = found
    return None if None in (coordinator, count, index) else Job(coordinator, count, index, devices)


def _look_at_devices():
    """Makes JAX find its devices, and says which. UserError where it would silently run on the CPU instead."""
    try:
        devices, here = jax.devices(), jax.local_devices()
    except RuntimeError as error:
        raise UserError(f"JAX finds no device to run on: {str(error).splitlines()[0]}") from None
    if devices[0].platform == "cpu" and "cpu" not in _platforms().split(","):
        unused = unused_accelerator()
        if unused:
            kind, extra = unused
            raise UserError(
                f"this machine has {kind}, but JAX sees only the CPU; pip install 'sedd[{extra}]', or set "
                "JAX_PLATFORMS=cpu to run on the CPU all the same"
            )
    if jax.process_count() > 1:
        where = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        print(f"sedd: {where}{len(here)} of {len(devices)} devices ({here[0].device_kind})", file=sys.stderr)
    elif devices[0].platform != "cpu":
        print(f"sedd: {len(devices)} device(s) ({here[0].device_kind})", file=sys.stderr)


def _keep_compiled():
    """What is compiled for an accelerator is kept on this machine, for the next start of the same command."""
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "sedd" / "compiled"))


def _platforms() -> str:
    """What JAX was told to use (JAX_PLATFORMS)."""
    return jax.config.jax_platforms or ""


_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # PCI ids of Google's, from v2 to v7


def unused_accelerator(root: Path = Path("/")) -> tuple[str, str] | None:
    """An accelerator that the operating system knows of, and the extra to install for it."""
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError):
            device = vendor.with_name("device").read_text().strip()
            if vendor.read_text().strip() == "0x1ae0" and device in _TPUS:
                return "a TPU", "tpu"
    if any(root.glob("dev/nvidia[0-9]*")):
        return "an NVIDIA GPU", "cuda12"
    return None


@functools.cache
def _reduction():
    """How flags lie, one a device, and what says whether any of them is set."""
    mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P("device")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _client():
    from jax._src import distributed

    return distributed.global_state.client


def _failure() -> str | None:
    """What another process says of its failure; None while none has failed."""
    try:
        reason = _client().key_value_try_get(_FAILED)
    except Exception:  # there is no such key
        return None
    return None if reason.startswith(f"process {jax.process_index()} ") else reason


def _stop_with_it(reason: str):
    print(f"sedd: stopped, because another process failed: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _watch():
    """Ends this process as soon as another has said that it failed."""
    while True:
        time.sleep(_LOOK)
        reason = _failure()
        if reason is not None:
            _stop_with_it(reason)


def _excepthook(kind, error, trace):
    """What is done with an exception that nobody catches."""
    reason = _failure()
    if reason is not None:  # a collective without it has failed here, which is no news
        _stop_with_it(reason)
    traceback.print_exception(kind, error, trace)
    abort_job(1, f"{kind.__name__}: {error}".splitlines()[0])
