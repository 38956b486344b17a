"""Staging of an output directory: it appears only when it is complete, and interrupted work can resume."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from sedd.errors import UserError
from sedd.runtime import disk


@contextmanager
def staging_directory(out: Path, request: dict[str, Any], result: str) -> Iterator[Path]:
    """Yields a staging directory beside `out`; at the end of the block, its folder `result` becomes `out`.

    After an interruption, or if the disk is full, the staging directory remains, and the same request resumes with its
    content. It is removed at a UserError, and emptied for a different request. UserError if another process holds it,
    or for an error of the disk.
    """
    folder = out.with_name(f".{out.name}.preparing")
    with disk.user_errors(folder, "; what is done is kept"), disk.locked(folder):
        if out.exists() and any(out.iterdir()):
            raise UserError(f"another process has made {out} meanwhile; repeat the command")
        record = folder / "request.json"
        if not record.is_file() or record.read_text() != json.dumps(request):
            disk.clear(epath.Path(folder))
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
    """Returns the path, size and modification time of each file, to detect changes since an interruption."""
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in ((file, file.stat()) for file in files)]
