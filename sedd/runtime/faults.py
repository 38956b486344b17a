"""Faults of the machine: a disk that is full or read-only, memory that is too small. One line says what to change."""

import jax

from sedd.runtime import disk

_LESS = "lower --batch_size, which changes no result"
_LESS_MEMORY = {  # what to change, by command
    **dict.fromkeys(
        ("train", "quickstart"),
        "lower training.batch_size, or raise training.accumulation, or set network.remat=full; the last two change no "
        "result",
    ),
    "prepare": "lower --workers",
}


def fault(error: BaseException, command: str) -> str | None:
    """The line for an exception that is a fault of the machine, in one of the commands of `sedd`; None for others."""
    if isinstance(error, OSError):
        return disk.fault(error)
    if isinstance(error, MemoryError):
        where = "this machine's memory is too small"
    elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        where = "the memory of the devices is too small"
    else:
        return None
    about = str(error).strip().split("\n")[0][:200]
    return f"{where}{f' ({about})' if about else ''}: {_LESS_MEMORY.get(command, _LESS)}"
