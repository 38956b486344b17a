"""Long work on a folder: it appears when it is complete, and an interruption loses nothing."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sedd.errors import UserError


@contextmanager
def workplace(out: Path, request: dict[str, Any], result: str) -> Iterator[Path]:
    """A folder to work in, beside `out`, whose folder `result` becomes `out` when all went well.

    After an interruption it stays, and the same request goes on with what is in it. It vanishes with a mistake of the
    user's, and where another request comes.

    Raises:
      UserError: another process is working on it.
    """
    folder = out.with_name(f".{out.name}.preparing")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends, however it does
        record = folder / "request.json"
        if not record.is_file() or record.read_text() != json.dumps(request):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            record.write_text(json.dumps(request))
        (folder / result).mkdir(exist_ok=True)
        yield folder
        (folder / result).replace(out)
        shutil.rmtree(folder)
    except BlockingIOError:
        raise UserError(f"{out} is being prepared by another process; wait for it, or choose another --out") from None
    except UserError:
        shutil.rmtree(folder)
        raise
    finally:
        os.close(lock)


def stamps(files: Iterable[Path]) -> list[list]:
    """What tells whether files have changed since an interruption: their sizes and times."""
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in ((file, file.stat()) for file in files)]


def write_whole(path: Path, values: Any):
    """Writes a JSON file that is whole whenever it is there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values))
    part.replace(path)
