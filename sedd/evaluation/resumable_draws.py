"""The draws of a scoring job in a folder, saved batch by batch, from which the job resumes after an interruption."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath

from sedd.errors import UserError
from sedd.runtime import disk, folders, processes, storage

KEPT = "; what is scored is kept"
_DRAWS = "draws.f32"
_SYNC = 60  # seconds between copies into a bucket


class ResumableDraws:
    """The records of a job in a folder, from which the job resumes after an interruption. A context manager.

        job.json     everything that the records depend on
        draws.f32    the records of the rows in order, little-endian

    A truncated record is scored again. Without a folder, records are in memory only. Process 0 reads, writes and locks
    the folder, and broadcasts the existing records to the others.
    """

    def __init__(
        self,
        folder: epath.Path | None,
        job: dict,
        shape: tuple[int, int],
        rows: int,
        levels: Callable[[int], np.ndarray],
    ):
        """shape: (M, K) of a record; rows: number of rows of the job; levels: `levels_of` as a function of num_rows.

        UserError if the folder holds another job, more rows, or records of another job; or if another process uses it.
        """
        self.shape, self._folder = shape, folder
        self._mirror: storage.Mirror | None = None
        self._parts: list[np.ndarray] = []
        self._synced, self._held = time.monotonic(), contextlib.ExitStack()
        if folder is None:
            return
        existing = np.zeros((0, *shape), np.float32)
        with contextlib.ExitStack() as held:
            with processes.together():
                if processes.is_first():
                    held.enter_context(folders.locked(folder))
                    with storage.user_errors(folder):
                        _write_or_check_job(folder, job)
                        self._mirror = held.enter_context(storage.Mirror(folder, (_DRAWS,)))
                        existing = self._read(self._mirror.local / _DRAWS)
                    _check_records(folder, existing, rows, levels)
            self._held = held.pop_all()
        self._parts.append(processes.broadcast_array_from_first(existing))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._held.__exit__(*error)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def append(self, records: np.ndarray):
        """Adds the records of the next rows, Float32[n M K]."""
        self._parts.append(records)
        if self._folder is None or self._mirror is None:
            return
        with storage.user_errors(self._folder, KEPT), open(self._mirror.local / _DRAWS, "ab") as file:
            file.write(records.astype("<f4").tobytes())
        if time.monotonic() - self._synced > _SYNC:
            self._mirror.sync()
            self._synced = time.monotonic()

    def records(self) -> np.ndarray:
        """The records of all rows scored so far, Float32[n M K]."""
        return np.concatenate([np.zeros((0, *self.shape), np.float32), *self._parts])

    def _read(self, file: Path) -> np.ndarray:
        """Returns the complete records of the file, and truncates an incomplete one at its end."""
        if not file.exists():
            return np.zeros((0, *self.shape), np.float32)
        complete = file.stat().st_size // (4 * math.prod(self.shape))
        records = np.fromfile(file, "<f4", complete * math.prod(self.shape)).reshape(-1, *self.shape)
        os.truncate(file, records.nbytes)
        return records


def _write_or_check_job(folder: epath.Path, job: dict):
    """Writes job.json into an empty folder. UserError if the folder is of another job, or of none."""

    def differences(existing):
        return [f"its {key} differs" for key in {**existing, **job} if existing.get(key) != job.get(key)][:1]

    file = folder / "job.json"
    if folders.existing_description(file, "evaluation", "--out", _read_job, differences) is None:
        disk.write_text_atomic(file, json.dumps(job))


def _read_job(file: epath.Path) -> dict:
    try:
        return dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: it is no JSON; remove {file.parent} and evaluate again") from None


def _check_records(folder: epath.Path, records: np.ndarray, rows: int, levels: Callable[[int], np.ndarray]):
    """UserError unless each record has the levels and widths of its row: two jobs may have written to the file."""
    remedy = f"remove {folder} and evaluate again"
    if len(records) > rows:
        raise UserError(f"{folder} holds the records of {len(records)} rows, and this evaluation has {rows}; {remedy}")
    if len(records):
        close = np.isclose(records[..., :2], levels(len(records)), rtol=1e-3, atol=1e-5).all((1, 2))
        if not close.all():
            raise UserError(f"{folder} holds a record that is not that of row {int(close.argmin())}; {remedy}")
