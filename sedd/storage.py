"""Folders of results: on a disk or in a bucket (gs://), which all processes of a job see."""

import contextlib
import fcntl
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sedd import processes
from sedd.errors import UserError

_PATIENCE = 20  # seconds that a network file system may take to show others what was written


def folder_of(path: str | os.PathLike) -> epath.Path:
    """The path, absolute where it is on a disk. UserError for a place that cannot be written to."""
    text = os.fspath(path)
    scheme, found, _ = text.partition("://")
    if not found:
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    if scheme != "gs":
        raise UserError(f"{text}: results go to a folder, or to a bucket as gs://BUCKET/FOLDER")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError(f"{text}: gs:// needs gcsfs; pip install 'sedd[gcs]'") from None
    return epath.Path(text)


def is_bucket(path: epath.Path) -> bool:
    """Whether the path lies in a bucket, where nothing can be appended to or locked."""
    return "://" in os.fspath(path)


def check_shared(folder: epath.Path):
    """UserError, in every process, unless all see in the folder what process 0 writes there. All have to call it."""
    name = processes.gathered(f".probe-{secrets.token_hex(8)}")[0]
    with processes.together():
        if processes.is_first():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(name)
            except Exception as error:  # whatever a file system says
                raise UserError(f"{folder} cannot be written to ({_reason(error)}); choose another") from None
    with processes.together():
        if not _appears(folder / name):
            raise UserError(
                f"{folder} is not the folder that process 0 writes to; give one that all processes share, or gs://"
            )
    if processes.is_first():
        (folder / name).unlink(missing_ok=True)


def _appears(file: epath.Path) -> bool:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            if file.read_text() == file.name:
                return True
        except Exception:  # not there, or not yet
            pass
        if time.monotonic() > until or processes.is_first():
            return False
        time.sleep(0.5)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Holds the folder against other jobs on its disk, until the end of the process at the latest; a bucket has none.

    UserError where another job holds it.
    """
    if is_bucket(folder):
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}; wait for it, or end it") from None
        except OSError:  # a file system without locks
            pass
        yield


class Mirror:
    """A folder in which files are appended to: itself, or in front of a bucket a local copy that `sync` uploads.

    A context manager, which uploads at its end too.
    """

    def __init__(self, folder: epath.Path, names: tuple[str, ...]):
        """names: of the files to go on with, where they are there."""
        self._folder, self._temporary, self._sizes = folder, None, {}
        if not is_bucket(folder):
            self.local = Path(folder)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="sedd-")
        self.local = Path(self._temporary.name)
        for name in names:
            if (folder / name).exists():
                (self.local / name).write_bytes((folder / name).read_bytes())
                self._sizes[Path(name)] = (self.local / name).stat().st_size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def sync(self):
        """Uploads what has grown or shrunk since the last time."""
        if self._temporary is None:
            return
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, size = file.relative_to(self.local), file.stat().st_size
            if self._sizes.get(name) != size:
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self._folder / name).write_bytes(file.read_bytes())
                self._sizes[name] = size

    def close(self):
        """The last `sync`."""
        self.sync()
        if self._temporary is not None:
            self._temporary.cleanup()
