"""Several processes of one job: how they connect, exchange values, and end together after an error.

Every process runs the same command. Process 0 writes files and prints results; all processes compute.
"""

import atexit
import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
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
_HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead, and the job ends
_FAILED = "sedd/failed"  # the key of the coordinator's store under which a process reports that it failed, and why
_POLL_SECONDS = 1.0  # between reads of that key
_MESSAGE_BYTES = 512  # size of a message that all processes gather


class Job(NamedTuple):
    """The processes of a job. local_device_ids: those of this process, if the cluster assigns devices to processes."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None = None


def initialize():
    """Connects the processes of the job, checks the devices, and prints them to stderr.

    Call it before any other use of JAX; a second call does nothing. The processes are given by SEDD_COORDINATOR
    (HOST:PORT of process 0), SEDD_NUM_PROCESSES and SEDD_PROCESS_ID; else by the cluster (TPU metadata, Slurm, Open
    MPI, Kubernetes); else there is one.

    UserError if a process does not connect within SEDD_TIMEOUT seconds (300), runs another version or has another kind
    of device; or if the machine has an accelerator that JAX does not see.
    """
    if getattr(initialize, "done", False):
        return
    job = _job_from_env() or _job_from_cluster()
    if job is not None and job.num_processes > 1 and not jax.distributed.is_initialized():
        timeout = _number(TIMEOUT, _DEFAULT_TIMEOUT)
        meet(job.coordinator, job.num_processes, job.process_id, timeout, hint=f"{TIMEOUT}=SECONDS waits longer")
        with contextlib.suppress(AttributeError):  # the service would handle SIGTERM, which `fit` handles
            jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                job.coordinator,
                job.num_processes,
                job.process_id,
                job.local_device_ids,
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=_HEARTBEAT,
            )
        except RuntimeError as error:
            raise UserError(f"sedd.initialize() has to come before any other use of JAX ({error})") from None
    _check_devices()
    _enable_compilation_cache()
    if are_many():
        sys.excepthook = _excepthook
        _start_watch()
        check_same("version", f"sedd {__version__}, jax {jax.__version__}")
        check_same("kind of devices", jax.local_devices()[0].device_kind)
    initialize.done = True


def is_first() -> bool:
    """True in process 0, which writes and prints."""
    return jax.process_index() == 0


def are_many() -> bool:
    """True if the job has other processes. Initializes no device if it has none."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first_problem(problem: str | None) -> str | None:
    """Returns in all processes the first problem that any of them has, or None. All processes have to call it.

    If there are several processes, the text begins with the name of the one with the problem.
    """
    if not are_many():
        return problem
    message = f"process {jax.process_index()} ({socket.gethostname()}): {problem}" if problem else ""
    return next(filter(None, all_gather_text(message)), None)


def all_gather_text(text: str) -> list[str]:
    """Returns the texts of all processes in their order, the first 512 bytes of each. All processes have to call it."""
    if not are_many():
        return [text]
    from jax.experimental import multihost_utils

    padded = np.frombuffer(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def broadcast_from_first(value):
    """Returns the value of process 0. value: what JSON can represent. All processes have to call it."""
    encoded = broadcast_array_from_first(np.frombuffer(json.dumps(value).encode(), np.uint8))
    return json.loads(encoded.tobytes())


def broadcast_array_from_first(array: np.ndarray) -> np.ndarray:
    """Returns the array of process 0. The length of the first axis may differ in others. All have to call it."""
    if not are_many():
        return array
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(array))))
    local = array if is_first() else np.zeros((size, *array.shape[1:]), array.dtype)
    return np.asarray(multihost_utils.broadcast_one_to_all(local))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block in which a UserError of one process is raised in all, so that no process waits for one that failed."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problem = first_problem(problem)
    if problem is not None:
        raise UserError(problem)


def check_same(what: str, value: str):
    """UserError, which names the process, unless all processes have the same value. All have to call it."""
    values = all_gather_text(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"process {index} has another {what} than process 0: {other}, not {values[0]}")


def any_of(flag: bool) -> jax.Array | bool:
    """Returns whether the flag is set in any process, as an array that the devices compute asynchronously.

    All processes have to call it, equally often.
    """
    if not are_many():
        return flag
    rows, reduce = _reduction()
    flags = np.full(jax.local_device_count(), flag)
    return reduce(jax.make_array_from_process_local_data(rows, flags, (jax.device_count(),)))


def abort_job(status: int, reason: str):
    """Ends this process at once with the status, and the others within seconds. Does nothing if there are no others.

    Without it, the others would wait for minutes in a collective for a process that no longer runs.
    """
    if not are_many():
        return
    with contextlib.suppress(Exception):
        _client().key_value_set(_FAILED, f"process {jax.process_index()} ({socket.gethostname()}): {reason}")
        if is_first():  # the others read the key from this process
            time.sleep(3 * _POLL_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _job_from_env() -> Job | None:
    """Returns the job that the SEDD_ variables describe; None if none is set. UserError if they are invalid."""
    names = (COORDINATOR, PROCESSES, PROCESS)
    missing = [name for name in names if not os.environ.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(f"{', '.join(names)} go together; {missing[0]} is not set")
    host, _, port = os.environ[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{COORDINATOR} must be HOST:PORT of process 0, not {os.environ[COORDINATOR]!r}")
    num_processes, process_id = _number(PROCESSES), _number(PROCESS)
    if not 0 <= process_id < num_processes:
        raise UserError(f"{PROCESS} must be 0 .. {num_processes - 1} of {PROCESSES}={num_processes}, not {process_id}")
    return Job(os.environ[COORDINATOR], num_processes, process_id)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _job_from_cluster() -> Job | None:
    """Returns the job that JAX detects from the cluster, as `jax.distributed.initialize` would; None without one."""
    from jax._src.clusters import ClusterEnv

    coordinator, num_processes, process_id, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, _DEFAULT_TIMEOUT
    )
    if coordinator is None or num_processes is None or process_id is None:
        return None
    return Job(coordinator, num_processes, process_id, devices)


def _check_devices():
    """Initializes JAX's devices and prints them. UserError if JAX would silently use the CPU beside an accelerator."""
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


def _enable_compilation_cache():
    """Sets JAX's persistent compilation cache for accelerators, unless the user has set one."""
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "sedd" / "compiled"))


def _platforms() -> str:
    """Returns the platforms that the user asked JAX for (JAX_PLATFORMS)."""
    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]  # JAX defines the attribute at run time


_TPU_PCI_IDS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # v2 to v7


def unused_accelerator(root: Path = Path("/")) -> tuple[str, str] | None:
    """Returns an accelerator that the operating system lists, and the extra of sedd for it; None if there is none."""
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError):
            device = vendor.with_name("device").read_text().strip()
            if vendor.read_text().strip() == "0x1ae0" and device in _TPU_PCI_IDS:
                return "a TPU", "tpu"
    if any(root.glob("dev/nvidia[0-9]*")):
        return "an NVIDIA GPU", "cuda12"
    return None


@functools.cache
def _reduction():
    """Returns the sharding of an array of one flag for each device, and a jitted function that reduces it by `any`."""
    mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P("device")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))


def _client():
    from jax._src import distributed

    return distributed.global_state.client


def _failure() -> str | None:
    """Returns the message of another process that failed; None while none has failed."""
    try:
        reason = _client().key_value_try_get(_FAILED)
    except Exception:  # there is no such key
        return None
    return None if reason.startswith(f"process {jax.process_index()} ") else reason


def _exit_because_of(reason: str):
    print(f"sedd: stopped, because another process failed: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _start_watch():
    """Starts a thread that ends this process when another has reported that it failed.

    The thread ends before the interpreter does: inside the client at that time, it would abort the process.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(stop,), name="watch", daemon=True)
    thread.start()
    atexit.register(thread.join)  # what is registered last runs first
    atexit.register(stop.set)


def _watch(stop: threading.Event):
    while not stop.wait(_POLL_SECONDS):
        reason = _failure()
        if reason is not None:
            _exit_because_of(reason)


def _excepthook(kind, error, trace):
    """Reports an uncaught exception to the other processes and ends this one."""
    reason = _failure()
    if reason is not None:  # the exception is a collective that failed without that process
        _exit_because_of(reason)
    traceback.print_exception(kind, error, trace)
    abort_job(1, f"{kind.__name__}: {error}".splitlines()[0])
