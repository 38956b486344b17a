"""Which job holds a folder in a bucket: an object that is made where there is none, and renewed while the job lives.

Every write is conditional on the object's generation, so that of two jobs one succeeds. A job that ends removes it. One
that is killed cannot, so others wait until it has not been renewed for a minute, or take it over at once where they see
that its process is gone. No clocks are compared.
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

_RENEWED = 15.0  # seconds between renewals
_SILENCE = 60.0  # seconds without one after which the job is dead
_held: dict[str, "Lease"] = {}  # of this process, by folder


class Lease:
    """A context manager: holds `bucket/folder` until its end. files: gcsfs' file system."""

    def __init__(self, files, folder: str):
        bucket, _, name = folder.partition("/")
        self._files, self._folder, self._bucket, self._key = files, folder, bucket, f"{name}/{disk.LOCK}".lstrip("/")
        self._owner = {"token": secrets.token_hex(8), "pid": os.getpid(), "machine": machine(), "who": disk.me()}
        self._generation, self._lost, self._ended, self._thread = 0, False, threading.Event(), None

    def __enter__(self):
        """UserError if another job holds it."""
        seen, since = None, time.monotonic()
        while True:
            generation, owner = self._read()
            silent = generation == seen and time.monotonic() - since > _SILENCE
            if generation == 0 or silent or _is_gone(owner):
                if self._write(generation):
                    break
                continue
            if seen not in (None, generation):
                raise UserError(disk.held_by(f"gs://{self._folder}", owner.get("who")))
            if seen is None:
                who = owner.get("who", "another process")
                print(
                    f"sedd: {who} was at work in gs://{self._folder}; waiting up to {_SILENCE:.0f} s for a sign of it",
                    file=sys.stderr,
                )
            seen = generation
            time.sleep(_RENEWED / 10)
        _held[self._folder] = self
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        del _held[self._folder]
        if not self._lost:
            with contextlib.suppress(Exception):  # others find that its process is gone, or silent
                self._files.call("DELETE", "b/{}/o/{}", self._bucket, self._key, ifGenerationMatch=self._generation)

    def check(self):
        """UserError if another job has taken the folder over."""
        if self._lost:
            raise UserError(
                f"another job took gs://{self._folder} over, as this one had not been heard of for {_SILENCE:.0f} "
                "seconds; this one ends"
            )

    def _renew(self):
        while not self._ended.wait(_RENEWED):
            with contextlib.suppress(Exception):  # of the network: until it is back, the others may take it over
                if not self._write(self._generation):
                    self._lost = True
                    return

    def _read(self) -> tuple[int, dict]:
        """The generation of the object and whose it is; 0 where there is none."""
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
        """Whether the object is this job's now; it is not where its generation is another."""
        where = self._files.base.replace("/storage/v1/", "/upload/storage/v1/") + f"b/{self._bucket}/o"
        query = dict(uploadType="media", name=self._key, ifGenerationMatch=generation)
        try:
            about = self._files.call("POST", where, **query, data=json.dumps(self._owner).encode(), json_out=True)
            self._generation = int(about["generation"])
            return True
        except FileExistsError:  # the answer to an earlier attempt may have been lost
            found, owner = self._read()
            self._generation = found
            return owner.get("token") == self._owner["token"]


def check(folder: str):
    """UserError if another job has taken over what this process holds of `bucket/folder`, or of what it lies in."""
    for held, lease in list(_held.items()):
        if f"{folder}/".startswith(f"{held}/"):
            lease.check()


def _is_gone(owner: dict) -> bool:
    """Whether the process that held it ran on this machine, and runs no more."""
    pid = owner.get("pid")
    if owner.get("machine") != machine() or not isinstance(pid, int):
        return False
    if pid == os.getpid():  # this process, or another of before with the same number
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
    """What tells this machine, since it was started, and its space of process numbers from all others."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has them; elsewhere there is one space of numbers
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
