"""One-line messages for errors of the machine: a full or read-only disk, too little memory."""

import jax

from sedd.runtime import disk

_LESS = "lower --batch_size, which changes no result"
_LESS_MEMORY = {  # advice, by command
    **dict.fromkeys(
        ("train", "quickstart"),
        "lower training.batch_size, or raise training.accumulation, or set network.remat=full; the last two change no "
        "result",
    ),
    "prepare": "lower --workers",
}


def message_for(error: BaseException, command: str) -> str | None:
    """Returns one line for an error of the disk or of memory in a command of `sedd`; None for other exceptions."""
    if isinstance(error, OSError):
        return disk.message_for(error)
    if isinstance(error, MemoryError):
        where = "this machine's memory is too small"
    elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        where = "the memory of the devices is too small"
    else:
        return None
    about = str(error).strip().split("\n")[0][:200]
    return f"{where}{f' ({about})' if about else ''}: {_LESS_MEMORY.get(command, _LESS)}"
