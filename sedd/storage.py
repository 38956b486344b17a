"""Folders of results: on a disk or in a bucket (gs://), which all processes of a job see."""

import contextlib
import fcntl
import functools
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sedd import processes
from sedd.errors import UserError

_PATIENCE = 20  # seconds that a network file system may take to show others what was written, or a bucket to answer
_PROBE = ".probe-"  # how the names begin of files that show whether they can be written
os.environ.setdefault("EPATH_USE_TF", "false")  # buckets are reached in one way, whether or not TensorFlow is there


def folder_of(path: str | os.PathLike) -> epath.Path:
    """The path, absolute where it is on a disk. UserError where there is no such place, or no way to it."""
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
    path = epath.Path(text)
    _ask(_bucket(path), "b/{}/o", maxResults=1)
    return path


def is_bucket(path: epath.Path) -> bool:
    """Whether the path lies in a bucket, where nothing can be appended to or locked."""
    return "://" in os.fspath(path)


def _bucket(path: epath.Path) -> str:
    """The name of the bucket that it lies in."""
    name = os.fspath(path).partition("://")[2].partition("/")[0]
    if not name:
        raise UserError(f"{path} names no bucket; write gs://BUCKET/FOLDER")
    return name


@functools.cache
def _files():
    """Buckets as epath sees them: it takes the same object of fsspec's."""
    import fsspec
    import google.auth

    logging.getLogger("gcsfs").addFilter(_is_news)
    logging.getLogger("google.auth._default").setLevel(logging.ERROR)  # that there are no credentials, `_ask` says
    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:  # of this machine neither; gcsfs would look for them again
        os.environ.setdefault("NO_GCE_CHECK", "true")
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # others write there too
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _is_news(record: logging.LogRecord) -> bool:
    """gcsfs logs what it raises as well; and what kind of bucket it is, it can do without."""
    return not record.exc_info and "bucket type" not in record.getMessage()


@functools.cache
def _ask(bucket: str, what: str, **parameters):
    """Asks Google Cloud Storage something of the bucket. UserError where that fails, with what to do about it."""
    try:
        _files().call("GET", what, bucket, timeout=_PATIENCE, **parameters)
    except FileNotFoundError:
        make = f"gcloud storage buckets create gs://{bucket}"
        raise UserError(f"there is no bucket gs://{bucket}; choose another, or make it with {make}") from None
    except Exception as error:  # of the network, of credentials, of rights
        reason = f"no answer in {_PATIENCE} seconds" if isinstance(error, TimeoutError) else _reason(error)
        mend = "check the network, and renew the credentials with gcloud auth application-default login"
        if str(error).startswith("Forbidden"):
            mend = "the roles storage.objectUser and storage.legacyBucketReader are needed"
        elif _files().credentials.credentials is None:
            mend = "there are no credentials; gcloud auth application-default login makes some"
        raise UserError(f"gs://{bucket} cannot be used ({reason}): {mend}") from None


def _probe() -> str:
    return f"{_PROBE}{secrets.token_hex(8)}"


def check_writable(folder: epath.Path):
    """Makes the folder. UserError where it cannot be written to."""
    name = _probe()
    _leave(folder, name)
    _remove(folder, name)


def _leave(folder: epath.Path, name: str):
    """Makes the folder, and a file in it that contains its own name."""
    if is_bucket(folder):
        _ask(_bucket(folder), "b/{}")  # as Orbax does, but only when it first removes a checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except Exception as error:  # whatever a file system says
        raise UserError(f"{folder} cannot be written to ({_reason(error)}); choose another") from None


def _remove(folder: epath.Path, name: str):
    """Removes the file, as older checkpoints are to be."""
    try:
        (folder / name).unlink(missing_ok=True)
    except Exception as error:
        raise UserError(f"nothing can be removed from {folder} ({_reason(error)}); choose another") from None


def is_empty(folder: epath.Path) -> bool:
    """Whether nothing is there but what was cut off while it was made."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return all(name.endswith(".part") or name.startswith(_PROBE) for name in names)


def check_shared(folder: epath.Path):
    """UserError, in every process, unless all see in the folder what process 0 writes there. All have to call it."""
    name = processes.gathered(_probe())[0]
    with processes.together():
        if processes.is_first():
            _leave(folder, name)
    with processes.together():
        if not _appears(folder / name):
            raise UserError(
                f"{folder} is not the folder that process 0 writes to; give one that all processes share, or gs://"
            )
    with processes.together():
        if processes.is_first():
            _remove(folder, name)


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
    return getattr(error, "strerror", None) or line_of(error)


def line_of(error: BaseException) -> str:
    """The line of a message that says most: the first, or the last where gcsfs begins with the address."""
    said = str(error).strip()
    return said.split("\n")[-1 if said.startswith("Forbidden") else 0] or type(error).__name__


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
        self._folder, self._temporary, self._stamps = folder, None, {}
        if not is_bucket(folder):
            self.local = Path(folder)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="sedd-")
        self.local = Path(self._temporary.name)
        for name in names:
            if (folder / name).exists():
                (self.local / name).write_bytes((folder / name).read_bytes())
                self._stamps[Path(name)] = _stamp(self.local / name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def sync(self):
        """Uploads what has changed since the last time. UserError where that fails."""
        if self._temporary is None:
            return
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, stamp = file.relative_to(self.local), _stamp(file)
            if self._stamps.get(name) != stamp:
                try:
                    (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self._folder / name).write_bytes(file.read_bytes())
                except Exception as error:  # of the network, of credentials that have run out
                    reason = _reason(error)
                    raise UserError(
                        f"{name} could not be written to {self._folder} ({reason}); the same command continues"
                    ) from error
                self._stamps[name] = stamp

    def close(self):
        """The last `sync`."""
        self.sync()
        if self._temporary is not None:
            self._temporary.cleanup()


def _stamp(file: Path) -> tuple[int, int]:
    """What tells whether a file has changed."""
    return file.stat().st_size, file.stat().st_mtime_ns
