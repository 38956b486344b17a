"""Paths of results, on a disk or in a bucket (gs://): whether they can be used, and files that are appended to."""

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
from sedd.runtime.lease import check

_TIMEOUT_SECONDS = 20  # seconds until other hosts of a network file system see a file, or until a bucket answers
PROBE = ".probe-"  # prefix of the files that test whether a folder can be written to
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control, surrogate, line and paragraph separators
os.environ.setdefault("EPATH_USE_TF", "false")  # gcsfs is used for buckets even if TensorFlow is installed


class _Folder(type(epath.Path("/"))):  # type: ignore[misc]  # etils exports no name for the class
    """An epath whose `glob` reads patterns in its argument only; etils reads `[` in the path itself as one too."""

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return map(self._new, self._backend.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def folder_of(path: str | os.PathLike) -> epath.Path:
    """Returns the folder of a path, made absolute by `disk.absolute`.

    UserError if the bucket does not exist or cannot be reached, or if a library would misread the name.
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
    """True for a path in a bucket, where files cannot be appended to or locked."""
    return "://" in os.fspath(path)


def _bucket(path: epath.Path) -> str:
    """Returns the name of the bucket of a path."""
    name = os.fspath(path).partition("://")[2].partition("/")[0]
    if not name:
        raise UserError(f"{path} names no bucket; write gs://BUCKET/FOLDER")
    return name


@functools.cache
def bucket_files():
    """Returns the fsspec file system of buckets, the object that epath uses too."""
    import fsspec
    import google.auth

    logging.getLogger("gcsfs").addFilter(_is_new_information)
    logging.getLogger("google.auth._default").setLevel(logging.ERROR)  # `_ask` reports missing credentials
    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:  # gcsfs would ask the metadata server once more
        os.environ.setdefault("NO_GCE_CHECK", "true")
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # other jobs write there too
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _is_new_information(record: logging.LogRecord) -> bool:
    """False for log records of exceptions, which gcsfs raises too, and of the bucket type, which it does not need."""
    return not record.exc_info and "bucket type" not in record.getMessage()


@functools.cache
def _ask(bucket: str, what: str, **parameters):
    """Sends Google Cloud Storage one GET request about the bucket. UserError, with advice, if it fails."""
    try:
        bucket_files().call("GET", what, bucket, timeout=_TIMEOUT_SECONDS, **parameters)
    except FileNotFoundError:
        make = f"gcloud storage buckets create gs://{bucket}"
        raise UserError(f"there is no bucket gs://{bucket}; choose another, or make it with {make}") from None
    except Exception as error:  # network, credentials, permissions
        reason = f"no answer in {_TIMEOUT_SECONDS} seconds" if isinstance(error, TimeoutError) else _reason(error)
        advice = "check the network, and renew the credentials with gcloud auth application-default login"
        if str(error).startswith("Forbidden"):
            advice = "the roles storage.objectUser and storage.legacyBucketReader are needed"
        elif bucket_files().credentials.credentials is None:
            advice = "there are no credentials; gcloud auth application-default login makes some"
        raise UserError(f"gs://{bucket} cannot be used ({reason}): {advice}") from None


def _probe() -> str:
    return f"{PROBE}{secrets.token_hex(8)}"


def check_writable(folder: epath.Path):
    """Creates the folder. UserError if files cannot be written to it or removed from it."""
    name = _probe()
    _write_probe(folder, name)
    _remove_probe(folder, name)


def _write_probe(folder: epath.Path, name: str):
    """Creates the folder, and in it a file that contains its own name."""
    if is_bucket(folder):
        _ask(_bucket(folder), "b/{}")  # Orbax sends this request when it first removes a checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except Exception as error:  # types differ by file system
        raise UserError(f"{folder} cannot be written to ({_reason(error)}); choose another") from None


def _remove_probe(folder: epath.Path, name: str):
    """Removes the file. UserError if that is not permitted; old checkpoints have to be removed too."""
    try:
        (folder / name).unlink(missing_ok=True)
    except Exception as error:
        raise UserError(f"nothing can be removed from {folder} ({_reason(error)}); choose another") from None


def check_shared(folder: epath.Path):
    """UserError, in every process, unless all see the files that process 0 writes there. All have to call it."""
    name = processes.all_gather_text(_probe())[0]
    with processes.together():
        if processes.is_first():
            _write_probe(folder, name)
    with processes.together():
        if not _appears(folder / name):
            raise UserError(
                f"{folder} is not the folder that process 0 writes to; give one that all processes share, or gs://"
            )
    with processes.together():
        if processes.is_first():
            _remove_probe(folder, name)


def _appears(file: epath.Path) -> bool:
    until = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        try:
            if file.read_text() == file.name:
                return True
        except Exception:  # not there yet
            pass
        if time.monotonic() > until or processes.is_first():
            return False
        time.sleep(0.5)


def _reason(error: Exception) -> str:
    """Returns the cause in one line."""
    return getattr(error, "strerror", None) or line_of(error)


def line_of(error: BaseException) -> str:
    """Returns the first line of a message; the last one for "Forbidden", where gcsfs begins with the address."""
    message = str(error).strip()
    return message.split("\n")[-1 if message.startswith("Forbidden") else 0] or type(error).__name__


@contextlib.contextmanager
def user_errors(folder: epath.Path, note: str = "") -> Iterator[None]:
    """A block that writes to the folder, in which errors of disk and network become a UserError.

    note: end of its message, such as what is kept.
    """
    try:
        with disk.user_errors(folder, note):
            yield
    except UserError:
        raise
    except Exception as error:  # network, expired credentials
        if not is_bucket(folder):
            raise
        raise UserError(f"{folder} cannot be written to ({_reason(error)}); repeat the command{note}") from error


class Mirror:
    """A folder whose files are appended to; for a bucket a local copy that `sync` uploads.

    A context manager, which calls `sync` at its end.
    """

    def __init__(self, folder: epath.Path, names: tuple[str, ...]):
        """names: files to download first, if they exist."""
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
        """Uploads files that have changed since the last call. UserError if that fails or another job has the lock."""
        if self._temporary is None:
            return
        check(os.fspath(self._folder).removeprefix("gs://"))
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, stamp = file.relative_to(self.local), _stamp(file)
            if self._stamps.get(name) != stamp:
                with user_errors(self._folder):
                    (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (self._folder / name).write_bytes(file.read_bytes())
                self._stamps[name] = stamp

    def close(self):
        """Calls `sync` and removes the local copy."""
        self.sync()
        if self._temporary is not None:
            self._temporary.cleanup()


def _stamp(file: Path) -> tuple[int, int]:
    """Returns size and modification time, which differ once a file has changed."""
    return file.stat().st_size, file.stat().st_mtime_ns
