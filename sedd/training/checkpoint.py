"""Checkpoints: Orbax behind one file, and a digest of every file of theirs, verified before anything is read.

Orbax notices arrays that are cut short or missing, but restores a changed byte without a word; and it never goes back
to an older checkpoint by itself.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sedd.errors import UserError
from sedd.parallel import named
from sedd.training.step import TrainState

DIGESTS = "digests.json"


class Checkpoints:
    """The checkpoints of a run, in a folder: each is written whole or not at all. A context manager."""

    def __init__(self, directory: Path, keep: int = 1):
        """keep: how many of the newest stay."""
        import orbax.checkpoint as ocp  # slow to import, and of no use to who only samples from an exported model

        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._manager.close()

    def save(self, state: TrainState):
        """Writes the state, unless its step is there already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        arrays = {name: self._args.StandardSave(_flat(tree)) for name, tree in _items(state).items()}
        self._manager.save(step, args=self._args.Composite(**arrays))
        _seal(self.directory / str(step))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that verifies, or None where none was ever written.

        like: the shapes, types and shardings, as `jax.ShapeDtypeStruct`.
        """
        step = self._newest()
        if step is None:
            return None
        items = self._read(step, _items(like))
        step = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(step, items["params"], items.get("ema"), items["optimizer"])

    def restore_params(self, like: dict, ema: bool) -> dict:
        """The parameters to evaluate and sample with, of the newest checkpoint that verifies."""
        step, name = self._newest(), "ema" if ema else "params"
        if step is None:
            raise UserError(f"{self.directory} holds no checkpoint yet; train a little longer")
        return self._read(step, {name: like})[name]

    def _newest(self) -> int | None:
        """The newest step that verifies. UserError where there are checkpoints, but none does."""
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            if _is_whole(self.directory / str(step)):
                for worse in damaged:
                    print(
                        f"sedd: the checkpoint of step {worse} is damaged; going back to step {step}", file=sys.stderr
                    )
                return step
            damaged.append(step)
        if damaged:
            raise UserError(f"the checkpoints in {self.directory} are damaged, all of them; restore them from a copy")
        return None

    def _read(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        arrays = {name: self._args.StandardRestore(_flat(tree)) for name, tree in like.items()}
        read = self._manager.restore(step, args=self._args.Composite(**arrays))
        return {
            name: jax.tree.unflatten(jax.tree.structure(tree), [read[name][path] for path in _flat(tree)])
            for name, tree in like.items()
        }


def any_saved(directory: Path) -> bool:
    """Whether a run left checkpoints there, whole or not."""
    return directory.is_dir() and any(path.name.isdigit() for path in directory.iterdir())


def _items(state: TrainState) -> dict[str, Any]:
    """What is stored apart, so that inference reads the parameters alone."""
    items = {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}
    return {name: tree for name, tree in items.items() if tree is not None}


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return named(tree, separator=".")  # Orbax makes files of the names


def _seal(checkpoint: Path):
    """Writes the digests of a finished checkpoint; without them it does not count."""
    part = checkpoint / f"{DIGESTS}.part"
    part.write_text(json.dumps(_digests(checkpoint), indent=2) + "\n")
    part.rename(checkpoint / DIGESTS)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / DIGESTS).read_text()) == _digests(checkpoint)
    except (OSError, ValueError):
        return False


def _digests(checkpoint: Path) -> dict[str, int]:
    """The CRC of each file."""
    files = (file for file in sorted(checkpoint.rglob("*")) if file.is_file() and not file.name.startswith(DIGESTS))
    return {str(file.relative_to(checkpoint)): zlib.crc32(file.read_bytes()) for file in files}
