"""The owner of a folder of results: the job that holds its lock, and whose description, a file of JSON, is in it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from sedd.errors import UserError
from sedd.runtime import disk, processes, storage
from sedd.runtime.lease import Lease


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Creates the folder and locks it against other jobs until the end of the block or of the process.

    UserError if another job holds the lock, or the folder cannot be created or written to.
    """
    with contextlib.ExitStack() as stack:
        if storage.is_bucket(folder):
            storage.check_writable(folder)
            with storage.user_errors(folder):
                stack.enter_context(Lease(storage.bucket_files(), os.fspath(folder).removeprefix("gs://").rstrip("/")))
        else:
            stack.enter_context(disk.locked(Path(folder)))
        yield


@contextlib.contextmanager
def locked_by_first(folder: epath.Path | None) -> Iterator[None]:
    """`locked` by process 0 for the whole job. All processes have to call it. None: there is no folder to lock."""
    with contextlib.ExitStack() as stack:
        with processes.together():
            if folder is not None and processes.is_first():
                stack.enter_context(locked(folder))
        yield


def is_empty(folder: epath.Path) -> bool:
    """True if the folder holds only lock, probe and partial files, or does not exist."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return all(name == disk.LOCK or name.endswith(".part") or name.startswith(storage.PROBE) for name in names)


def existing_description(
    file: epath.Path,
    kind: str,
    flag: str,
    read: Callable[[epath.Path], dict[str, Any]],
    differences: Callable[[dict[str, Any]], list[str]],
) -> dict[str, Any] | None:
    """Returns the description of this job, if its locked folder holds one; None if the folder is empty.

    file: of the description; kind: of the job, such as "run"; flag: the option that names the folder; differences:
    given a description, as of `read`, each difference that makes it that of another job. UserError if the folder is
    that of another job, or holds other files only.
    """
    folder = file.parent
    if not file.is_file():
        if not is_empty(folder):
            raise UserError(f"{folder} is not empty and holds no {kind}; choose another {flag}")
        return None
    description = read(file)
    if different := differences(description):
        raise UserError(f"{folder} holds another {kind}: {', '.join(different)}; choose another {flag}")
    return description


@contextlib.contextmanager
def filled(folder: epath.Path) -> Iterator[None]:
    """A block that fills a locked, empty folder; after an error the folder is emptied. UserError if it is not empty."""
    if not is_empty(folder):
        raise UserError(f"{folder} is not empty; choose another folder")
    try:
        with storage.user_errors(folder):
            yield
    except BaseException:
        with contextlib.suppress(Exception):
            disk.clear(folder)
        raise
