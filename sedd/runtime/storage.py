"""Folders of results: on a disk or in a bucket (gs://), which all processes of a job see."""

import contextlib
import functools
import glob
import logging
import os
import secrets
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sedd.errors import UserError
from sedd.runtime import disk, processes
from sedd.runtime.lease import Lease, check

_PATIENCE = 20  # seconds that a network file system may take to show others what was written, or a bucket to answer
_PROBE = ".probe-"  # how the names begin of files that show whether they can be written
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # categories of characters: control, no character, ends of lines and paragraphs
os.environ.setdefault("EPATH_USE_TF", "false")  # buckets are reached in one way, whether or not TensorFlow is there


class _Folder(type(epath.Path("/"))):
    """An epath whose `glob` reads patterns in its argument only: etils reads `[` in the path itself as one too."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return map(self._new, self._backend.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def folder_of(path: str | os.PathLike) -> epath.Path:
    """The folder that a path means, as `disk.absolute` has it.

    UserError where there is no such place, no way to it, or a library would take its name for another.
    """
    text = disk.absolute(path)
    scheme, found, _ = text.partition("://")
    misread = [char for char in text if unicodedata.category(char) in _CONTROL or char in ("*?[]#" if found else "\\")]
    if misread:
        raise UserError(f"{text!r}: {misread[0]!r} in the name of a folder is misread; choose another name")
    if not found:
        return _Folder(text)
    if scheme != "gs":
        raise UserError(f"{text}: results go to a folder, or to a bucket as gs://BUCKET/FOLDER")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError(f"{text}: gs:// needs gcsfs; pip install 'sedd[gcs]'") from None
    path = _Folder(text)
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
    return all(name == disk.LOCK or name.endswith(".part") or name.startswith(_PROBE) for name in names)


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
    """Makes the folder and holds it against other jobs, until the end of the block, or of the process.

    UserError if another job holds it, or it cannot be made or written to.
    """
    if not is_bucket(folder):
        with disk.locked(Path(folder)):
            yield
        return
    check_writable(folder)
    with contextlib.ExitStack() as stack:
        with written(folder):
            stack.enter_context(Lease(_files(), os.fspath(folder).removeprefix("gs://").rstrip("/")))
        yield


@contextlib.contextmanager
def held(folder: epath.Path | None) -> Iterator[None]:
    """`locked` by process 0, for all processes, which have to call it. None: there is nothing to hold."""
    with contextlib.ExitStack() as stack:
        with processes.together():
            if folder is not None and processes.is_first():
                stack.enter_context(locked(folder))
        yield


@contextlib.contextmanager
def written(folder: epath.Path, kept: str = "") -> Iterator[None]:
    """A block that writes to the folder: its failures become a UserError. kept: what is said then, of what remains."""
    try:
        with disk.faults(folder, kept):
            yield
    except UserError:
        raise
    except Exception as error:  # of the network, of credentials that have run out
        if not is_bucket(folder):
            raise
        raise UserError(f"{folder} cannot be written to ({_reason(error)}); repeat the command{kept}") from error


@contextlib.contextmanager
def filled(folder: epath.Path) -> Iterator[None]:
    """A block that fills a folder, which is held, or where that fails leaves nothing there. UserError if not empty."""
    if not is_empty(folder):
        raise UserError(f"{folder} is not empty; choose another folder")
    try:
        with written(folder):
            yield
    except BaseException:
        with contextlib.suppress(Exception):
            for path in folder.iterdir():
                if path.name != disk.LOCK:
                    path.rmtree() if path.is_dir() else path.unlink()
        raise


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
        """Uploads what has changed since the last time. UserError where that fails, or the folder is another job's."""
        if self._temporary is None:
            return
        check(os.fspath(self._folder).removeprefix("gs://"))
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, stamp = file.relative_to(self.local), _stamp(file)
            if self._stamps.get(name) != stamp:
                with written(self._folder):
                    (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self._folder / name).write_bytes(file.read_bytes())
                self._stamps[name] = stamp

    def close(self):
        """The last `sync`."""
        self.sync()
        if self._temporary is not None:
            self._temporary.cleanup()


def _stamp(file: Path) -> tuple[int, int]:
    """What tells whether a file has changed."""
    return file.stat().st_size, file.stat().st_mtime_ns
