"""Checkpoints: Orbax behind one file, with a digest of every array, verified when it is read back.

Orbax notices files that are cut short or missing, but not a changed byte; so each checkpoint carries the CRC of its
arrays, and reading one walks back to the newest that verifies.
"""

import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sedd.errors import UserError
from sedd.training.step import TrainState


class Checkpoints:
    """The checkpoints of a run, in a folder. A context manager: leaving it waits for what is still being written."""

    def __init__(self, directory: Path, keep: int = 1):
        """keep: how many of the newest stay."""
        import orbax.checkpoint as ocp  # slow to import, and of no use to who only samples

        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._manager.close()

    def save(self, state: TrainState):
        """Writes the state in the background, unless its step is there already. Arrays are copied first."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {name: _flat(tree) for name, tree in _items(state).items()}
        digests = {name: _digests(arrays) for name, arrays in items.items()}
        arrays = {name: self._args.StandardSave(arrays) for name, arrays in items.items()}
        self._manager.save(step, args=self._args.Composite(digests=self._args.JsonSave(digests), **arrays))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that verifies, or None where none was ever written.

        like: the shapes, types and shardings, as `jax.ShapeDtypeStruct`.
        """
        found = self._newest(_items(like))
        if found is None:
            return None
        step, items = found
        step = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(step, items["params"], items.get("ema"), items["optimizer"])

    def restore_params(self, like: dict, ema: bool) -> dict:
        """The parameters to evaluate and sample with, of the newest checkpoint that verifies."""
        name = "ema" if ema else "params"
        found = self._newest({name: like})
        if found is None:
            raise UserError(f"{self.directory} holds no checkpoint yet; train a little longer")
        return found[1][name]

    def _newest(self, like: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, self._read(step, like)
            except Exception as error:  # Orbax raises bare Exceptions, among others
                reason = str(error).strip().splitlines()[0][:200]
                print(f"sedd: the checkpoint of step {step} does not verify ({reason})", file=sys.stderr)
        if steps:
            raise UserError(f"no checkpoint under {self.directory} verifies; restore that folder, or train elsewhere")
        return None

    def _read(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        arrays = {name: self._args.StandardRestore(_flat(tree)) for name, tree in like.items()}
        composite = self._args.Composite(digests=self._args.JsonRestore(), **arrays)
        read = self._manager.restore(step, args=composite)
        for name in like:
            if _digests(read[name]) != read.digests[name]:
                raise ValueError(f"the arrays of {name} are not those that were written")
        return {name: jax.tree.unflatten(jax.tree.structure(tree), read[name].values()) for name, tree in like.items()}


def _items(state: TrainState) -> dict[str, Any]:
    """What is stored apart, so that inference reads the parameters alone."""
    items = {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}
    return {name: tree for name, tree in items.items() if tree is not None}


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digests(arrays: dict[str, Any]) -> dict[str, list]:
    """Type, shape and CRC of each array."""
    host = {name: np.ascontiguousarray(array) for name, array in jax.device_get(arrays).items()}
    return {name: [str(array.dtype), list(array.shape), zlib.crc32(array)] for name, array in host.items()}
