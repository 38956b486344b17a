"""Locks of folders in a bucket: a lock object that a job creates if there is none, and renews while it runs.

Every write is conditional on the object's generation, so that one of two competing jobs succeeds. A job removes the
object when it ends. A killed job cannot, so another job takes the lock over once it has not been renewed for a minute,
or at once if the process that held it ran on this machine and no longer exists. No clocks are compared.
"""

import contextlib
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from sedd.errors import UserError
from sedd.runtime import disk

_RENEWAL_SECONDS = 15.0  # between renewals
_EXPIRY_SECONDS = 60.0  # without a renewal, after which the lock may be taken over
_held: dict[str, "Lease"] = {}  # the leases of this process, by folder


class Lease:
    """A context manager that holds the lock of `bucket/folder`. files: the file system of gcsfs."""

    def __init__(self, files, folder: str):
        bucket, _, name = folder.partition("/")
        self._files, self._folder, self._bucket, self._key = files, folder, bucket, f"{name}/{disk.LOCK}".lstrip("/")
        self._owner = {"token": secrets.token_hex(8), "pid": os.getpid(), "machine": machine(), "who": disk.me()}
        self._generation, self._lost, self._ended, self._thread = 0, False, threading.Event(), None

    def __enter__(self):
        """Acquires the lock. UserError if another job holds it."""
        seen, since = None, time.monotonic()
        while True:
            generation, owner = self._read()
            expired = generation == seen and time.monotonic() - since > _EXPIRY_SECONDS
            if generation == 0 or expired or _is_gone(owner):
                if self._write(generation):
                    break
                continue
            if seen not in (None, generation):
                raise UserError(disk.held_by(f"gs://{self._folder}", owner.get("who")))
            if seen is None:
                who = owner.get("who", "another process")
                print(
                    f"sedd: {who} has locked gs://{self._folder}; waiting up to {_EXPIRY_SECONDS:.0f} s for a renewal",
                    file=sys.stderr,
                )
            seen = generation
            time.sleep(_RENEWAL_SECONDS / 10)
        _held[self._folder] = self
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        del _held[self._folder]
        if not self._lost:
            with contextlib.suppress(Exception):  # others find that the process is gone or the lock expired
                self._files.call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=self._generation)

    def check(self):
        """UserError if another job has taken the folder over."""
        if self._lost:
            raise UserError(
                f"another job took gs://{self._folder} over, because this one had not renewed its lock for "
                f"{_EXPIRY_SECONDS:.0f} seconds; this one ends"
            )

    def _renew(self):
        while not self._ended.wait(_RENEWAL_SECONDS):
            with contextlib.suppress(Exception):  # network errors; others may take it over meanwhile
                if not self._write(self._generation):
                    self._lost = True
                    return

    def _read(self) -> tuple[int, dict]:
        """Returns the generation of the object and its owner; 0 and {} if there is none."""
        try:
            headers, content = self._files.call("GET", "b/{}/o/{}", self._bucket, self._key, alt="media")
        except FileNotFoundError:
            return 0, {}
        try:
            owner = dict(json.loads(content))
        except (ValueError, TypeError):
            owner = {}
        return int(headers["x-goog-generation"]), owner

    def _write(self, generation: int) -> bool:
        """Writes the object if it has this generation. True if the object is now this job's."""
        where = self._files.base.replace("/storage/v1/", "/upload/storage/v1/") + f"b/{self._bucket}/o"
        query = dict(uploadType="media", name=self._key, ifGenerationMatch=generation)
        try:
            about = self._files.call("POST", where, **query, data=json.dumps(self._owner).encode(), json_out=True)
            self._generation = int(about["generation"])
            return True
        except FileExistsError:  # the answer to an earlier attempt may have been lost
            self._generation, owner = self._read()
            return owner.get("token") == self._owner["token"]


def check(folder: str):
    """UserError if another job has taken over a lock of this process on `bucket/folder` or a folder above it."""
    for held, lease in list(_held.items()):
        if f"{folder}/".startswith(f"{held}/"):
            lease.check()


def _is_gone(owner: dict) -> bool:
    """True if the owner is a process of this machine that no longer runs."""
    pid = owner.get("pid")
    if owner.get("machine") != machine() or not isinstance(pid, int):
        return False
    if pid == os.getpid():  # this process, or an earlier one with the same id
        return all(owner.get("token") != lease._owner["token"] for lease in _held.values())
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


@functools.cache
def machine() -> str:
    """Returns an identifier of this machine, its boot and its process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these files; elsewhere there is one process namespace
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
