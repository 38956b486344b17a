"""Paths, folders and files on a disk: path resolution, locks of folders, error messages, atomic writes."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TextIO

from etils import epath

from sedd.errors import UserError

LOCK = ".lock"  # name of the lock file in a folder
_ROOM = "make room there, and repeat the command"
_RIGHTS = "choose another place, or change its permissions"
_IN_THE_WAY = "something else is in the way; move it, or choose another name"
_ADVICE = {  # by OSError.errno
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _RIGHTS),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY), _IN_THE_WAY),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "choose another name"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or the network, and repeat the command"),
}


def absolute(path: str | os.PathLike) -> str:
    """Returns the absolute path: `~` is the home, other paths are relative to the current folder. A URL is unchanged.

    UserError if the path is empty, or names the home of a user who does not exist.
    """
    text = os.fspath(path)
    if not text:
        raise UserError("a path is empty; give a folder or a file")
    if "://" in text:
        return text
    if isinstance(path, PurePath) and path.parts[0] == "gs:":
        raise UserError(f"{text}: give the path of a bucket as text, gs://BUCKET/FOLDER; pathlib drops a slash of it")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        name = text.partition("/")[0]
        raise UserError(f"{text}: there is no user {name[1:]}; write ./{text} for a folder called {name}")
    return os.path.abspath(expanded)


def message_for(error: OSError, place: str | os.PathLike | None = None) -> str | None:
    """Returns one line with the error and what to do about it; None for an error that no user can correct.

    place: the file or folder in use, for errors that name none.
    """
    advice = None if error.errno is None else _ADVICE.get(error.errno)
    if advice is None:
        return None
    where = error.filename2 or error.filename or place
    where = "a file" if where is None or isinstance(where, int) else os.fsdecode(where)
    return f"{where} cannot be used ({error.strerror}); {advice}"


@contextlib.contextmanager
def user_errors(place: str | os.PathLike, note: str = "") -> Iterator[None]:
    """A block in which an OSError of the disk becomes a UserError. note: end of its message, such as what is kept."""
    try:
        yield
    except OSError as error:
        line = message_for(error, place)
        if line is None:
            raise
        raise UserError(f"{line}{note}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates the folder and locks it against other jobs until the end of the block or of the process.

    UserError if another job holds the lock, or the folder cannot be created or written to.
    """
    with user_errors(folder):
        file = _lock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a waiting job finds the file gone and creates another
            (folder / LOCK).unlink()
        file.close()


def _lock(folder: Path) -> TextIO:
    """Creates and locks the lock file; returns it open."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK).open("a+")
        except FileNotFoundError:  # the job that held the folder removed it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200)
            file.close()
            raise UserError(held_by(folder, holder)) from None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                _write_holder(file)
                return file
        file.close()


def _write_holder(file: TextIO):
    """Writes into the lock file which process holds it. For messages only, so a full disk is ignored."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(me())
        file.flush()


def me() -> str:
    """Returns the name of this process in messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def held_by(folder: os.PathLike, holder: str) -> str:
    """Returns the error message for a folder that another process has locked."""
    return f"another process is at work in {os.fspath(folder)} ({holder or 'unknown'}); wait for it, or end it"


def clear(folder: epath.Path):
    """Removes everything in a locked folder but its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.rmtree() if path.is_dir() else path.unlink()


def write_text_atomic(path: Path, text: str):
    """Writes a text file, in UTF-8, as `write_bytes_atomic` does."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes):
    """Writes a file atomically: readers see the old content or the new. path: a pathlib or epath path."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
