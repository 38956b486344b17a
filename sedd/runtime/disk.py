"""Paths, folders and files on a disk: what a path means, which job holds a folder, what to do when a disk refuses."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path, PurePath

from sedd.errors import UserError

LOCK = ".lock"  # the file in a folder by which one job holds it
_ROOM = "make room there, and repeat the command"
_RIGHTS = "choose another place, or change its permissions"
_IN_THE_WAY = "something else is in the way; move it, or choose another name"
_FAULTS = {  # of OSError.errno: what to do about it
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _RIGHTS),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY), _IN_THE_WAY),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "choose another name"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or the network, and repeat the command"),
}


def absolute(path: str | os.PathLike) -> str:
    """The absolute path: `~` is the home, all else is relative to the current folder. A URL is returned as it is.

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


def fault(error: OSError, place: str | os.PathLike | None = None) -> str | None:
    """The line that says what the disk refuses and what to do; None where the error is no mistake of a machine.

    place: the file or folder at work, for errors that name none.
    """
    advice = _FAULTS.get(error.errno)
    if advice is None:
        return None
    where = error.filename2 or error.filename or place
    where = "a file" if where is None or isinstance(where, int) else os.fsdecode(where)
    return f"{where} cannot be used ({error.strerror}); {advice}"


@contextlib.contextmanager
def faults(place: str | os.PathLike, kept: str = "") -> Iterator[None]:
    """A block in which what the disk refuses becomes a UserError. kept: the end of its line, of what is not lost."""
    try:
        yield
    except OSError as error:
        line = fault(error, place)
        if line is None:
            raise
        raise UserError(f"{line}{kept}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it against other jobs, until the end of the block, or of the process.

    UserError if another job holds it, or it cannot be made or written to.
    """
    with faults(folder):
        file = _lock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # who waits for it finds that it is no longer there, and makes another
            (folder / LOCK).unlink()
        file.close()


def _lock(folder: Path):
    """The locked file."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK).open("a+")
        except FileNotFoundError:  # the folder went with the job that held it
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
                _sign(file)
                return file
        file.close()


def _sign(file):
    """Writes down whose lock it is; not needed, so that a full disk is no fault here."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(me())
        file.flush()


def me() -> str:
    """This process, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def held_by(folder: os.PathLike, holder: str) -> str:
    """The line for who finds a folder held."""
    return f"another process is at work in {os.fspath(folder)} ({holder or 'unknown'}); wait for it, or end it"


def write_json_atomic(path: Path, text: str):
    """Writes a file that is whole whenever it is there. path: also one of epath's."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
