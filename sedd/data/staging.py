"""Long work on a folder: it appears when it is complete, and an interruption loses nothing."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sedd.errors import UserError
from sedd.runtime import disk


@contextmanager
def staging_directory(out: Path, request: dict[str, Any], result: str) -> Iterator[Path]:
    """A folder to work in, beside `out`, whose folder `result` becomes `out` when all went well.

    After an interruption, or when the disk is full, it stays, and the same request resumes with what is in it. It
    vanishes with a UserError, and where another request comes. UserError if another process works on it, or the disk
    refuses something.
    """
    folder = out.with_name(f".{out.name}.preparing")
    with disk.user_errors(folder, "; what is done is kept"), disk.locked(folder):
        if out.exists() and any(out.iterdir()):
            raise UserError(f"another process has made {out} meanwhile; repeat the command")
        record = folder / "request.json"
        if not record.is_file() or record.read_text() != json.dumps(request):
            for path in folder.iterdir():
                if path.name != disk.LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            record.write_text(json.dumps(request))
        (folder / result).mkdir(exist_ok=True)
        try:
            yield folder
        except UserError:
            shutil.rmtree(folder)
            raise
        (folder / result).replace(out)
        shutil.rmtree(folder)


def file_stamps(files: Iterable[Path]) -> list[list]:
    """What tells whether files have changed since an interruption: their sizes and times."""
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in ((file, file.stat()) for file in files)]
