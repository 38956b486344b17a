"""Checkpoints: Orbax behind one file, with a digest of every array, verified on the way back.

Orbax notices arrays that are cut short or missing, but restores a changed byte without a word, casts types likewise,
and never goes back to an older checkpoint by itself. A checkpoint is a folder named by its step:

    params/ ema/ optimizer/   the arrays, each by its path
    manifest/                 the step, its bound, and shape, type and digest of each array; without it nothing counts
"""

import contextlib
import dataclasses
import functools
import json
import sys
import textwrap
import threading
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sedd import parallel
from sedd.errors import UserError
from sedd.parallel import named
from sedd.runtime import disk, processes, storage
from sedd.training.digests import digests
from sedd.training.step import TrainState

_ITEMS = ("params", "ema", "optimizer")  # what is stored apart, so that inference reads the parameters alone
_COMMITTED = "commit_success.txt"  # what Orbax writes last in a bucket, where it can rename no folder at once
_ASIDE = "damaged-"  # before the step of what is passed over by a run that goes on


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of a run, in a folder that all processes see: each is written whole or not at all.

    A context manager. Writing goes on in the background; the next `save`, and the end, wait for it. config: the group
    `checkpoint`: of the newest `keep` stay, of the others those of every `keep_every` steps, and the best. All
    processes have to call all methods.
    """

    directory: epath.Path
    config: ConfigDict

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or issubclass(kind, UserError):
            self.finish(quiet=kind is not None)

    @functools.cached_property
    def _manager(self):
        """Made for the first `save`: that also clears away what an interrupted one left."""
        import orbax.checkpoint as ocp  # slow to import, and of no use to who only samples from an exported model

        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Staying(self.config, self._bounds),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        # What is whole on many devices is written by one of them; Orbax would have each write, and compile, a slice.
        types = ocp.type_handlers
        writer = types.ArrayHandler(min_slice_bytes_for_replica_parallel=parallel.MIN_SHARD_BYTES)
        arrays = ocp.PyTreeCheckpointHandler(
            type_handler_registry=types.create_type_handler_registry((jax.Array, writer))
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("manifest", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        for name in _ITEMS:
            handlers.add(name, ocp.args.PyTreeSave, arrays)
        return ocp.CheckpointManager(self.directory, options=options, handler_registry=handlers)

    @functools.cached_property
    def _bounds(self) -> dict[int, float]:
        """The bound of each checkpoint that has one. Orbax would forget them when another process goes on."""
        if not self.config.keep_best:
            return {}
        bounds = {}
        for step in steps_saved(self.directory):
            with contextlib.suppress(Exception):  # a damaged one is the best of nothing
                bounds[step] = float(_manifest(self.directory / str(step))["bound"])
        return bounds

    def save(self, state: TrainState, bound: float | None = None):
        """Writes the state, unless its step is there already. bound: on held-out text, in nats per token.

        UserError if it cannot be written, or the one before could not; those that are there stay.
        """
        import orbax.checkpoint as ocp

        step, items = int(state.step), _items(state)
        with self._written():
            if step in self._manager.all_steps():
                return
            arrays = {name: ocp.args.PyTreeSave(_flat(tree)) for name, tree in items.items()}
            manifest = {"step": step, "bound": bound, "arrays": _described(items, digests(items))}
            if bound is not None:
                self._bounds[step] = bound
            args = ocp.args.Composite(**arrays, manifest=ocp.args.JsonSave(manifest))
            self._manager.save(step, args=args, force=True)

    def add_bound(self, step: int, bound: float | None):
        """Adds the bound to the checkpoint of a step that was written without one. None: there is none."""
        if bound is None or step in self._bounds:
            return
        self._bounds[step] = bound
        with processes.together(), self._written():
            if processes.is_first():
                manifest = _manifest(self.directory / str(step)) | {"bound": bound}
                disk.write_json_atomic(self.directory / str(step) / "manifest" / "metadata", json.dumps(manifest))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that verifies, or None where none was ever written; what is passed over is put aside.

        like: the shapes, types and shardings, as `jax.ShapeDtypeStruct`.
        """
        if processes.is_first():
            for step, whole in _steps(self.directory):
                if not whole:  # what is written next replaces it
                    print(f"sedd: the checkpoint of step {step} was cut off while it was written", file=sys.stderr)
        found = _newest(self.directory, _items(like))
        if found is None:
            return None
        step, items, damaged = found
        with processes.together():
            if processes.is_first():
                for worse in damaged:  # the run will come to that step again
                    _put_aside(self.directory, worse)
        step = parallel.put(np.int32(step), like.step.sharding)
        return TrainState(step, items["params"], items.get("ema"), items["optimizer"])

    def finish(self, quiet: bool = False):
        """Waits for what is being written, the last of all. quiet: another mistake is on its way to the user."""
        if "_manager" not in self.__dict__:
            return
        with contextlib.suppress(UserError) if quiet else contextlib.nullcontext(), self._written():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _written(self):
        """What goes wrong while something is written, in a line; what it left behind goes."""
        try:
            yield
        except Exception as error:  # of Orbax, of its storage, of the file system
            _join_writers()
            if processes.is_first() and not storage.is_bucket(self.directory):
                for part in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    with contextlib.suppress(OSError):
                        part.rmtree()
            raise UserError(
                f"a checkpoint could not be written to {self.directory} ({_cause(error)}); those that are there stay. "
                "Mend that, and the same command continues"
            ) from error


def _join_writers(timeout: float = 10):
    """Waits for Orbax's other threads: it raises the first error while they still write into the folder of the step."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, timeout)  # its own join raises what the thread raised


@dataclasses.dataclass(frozen=True)
class _Staying:
    """Which checkpoints stay, as Orbax asks: the newest, those of every so many steps, and that of the best bound."""

    config: ConfigDict
    bounds: dict[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """context: Orbax's, of no use here."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        bounds = {step: self.bounds[step] for step in steps if step in self.bounds}
        staying = {*sorted(steps)[-self.config.keep :], *([min(bounds, key=bounds.get)] if bounds else [])}
        every = self.config.keep_every
        return [step in staying or bool(every and step % every == 0) for step in steps]


def restore_params(directory: epath.Path, like: dict, ema: bool, step: int | None = None) -> dict:
    """The parameters to evaluate and sample with, of the newest checkpoint that verifies, or of the one told.

    Reads only, also beside a run that is writing. UserError where there is none.
    """
    name = "ema" if ema else "params"
    while True:
        steps = processes.broadcast_from_first(steps_saved(directory)) if step is None else [step]
        try:
            found = _newest(directory, {name: like}, steps)
            break
        except UserError:  # a run beside may have removed these while they were read, and written newer ones
            if step is not None or processes.broadcast_from_first(steps_saved(directory))[-1:] <= steps[-1:]:
                raise
    if found is None:
        raise UserError(f"{directory} holds no checkpoint yet; train a little longer")
    return found[1][name]


def steps_saved(directory: epath.Path) -> list[int]:
    """The steps of the checkpoints that were written to their end, from the oldest on."""
    return [step for step, whole in _steps(directory) if whole]


def _steps(directory: epath.Path) -> list[tuple[int, bool]]:
    """The steps that are there, and whether each was written to its end. On a disk, others have other names."""
    if not directory.is_dir():
        return []
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    in_bucket = storage.is_bucket(directory)
    return [(step, not in_bucket or (directory / str(step) / _COMMITTED).is_file()) for step in steps]


def _newest(
    directory: epath.Path, like: dict[str, Any], steps: list[int] | None = None
) -> tuple[int, dict[str, Any], list[int]] | None:
    """The newest step that verifies, what was asked of it, and the newer ones that do not.

    None where there is none at all; UserError where none verifies. What is passed over is said.
    """
    passed = {}
    _hush()
    steps = processes.broadcast_from_first(steps_saved(directory)) if steps is None else steps
    for step in reversed(steps):
        items, problem = None, None
        try:
            items = _read(directory / str(step), step, like)
        except _Unusable as error:
            problem = str(error)
        except Exception as error:  # whatever Orbax, JSON or a file system say of a damaged file
            problem = f"is damaged ({_cause(error)})"
        problem = processes.first_problem(problem)
        if problem is None:
            if processes.is_first():
                for worse, why in passed.items():
                    print(f"sedd: the checkpoint of step {worse} {why}; going back to step {step}", file=sys.stderr)
            return step, items, list(passed)
        passed[step] = problem
    if passed:
        reasons = "; ".join(f"that of step {step} {why}" for step, why in passed.items())
        raise UserError(f"no checkpoint in {directory} can be used: {reasons}; restore one from a copy")
    return None


def _hush():
    """Lets one complaint pass unheard: when Orbax fails to read one array it forgets its reads of the others, and each
    of those then finds that the event loop it reports to is closed."""

    def heard(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    before, heard.hushed = sys.unraisablehook, True
    if not hasattr(before, "hushed"):
        sys.unraisablehook = heard


class _Unusable(ValueError):
    """What is wrong with a checkpoint that can be read."""


def _read(checkpoint: epath.Path, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Some items of one checkpoint, verified. Without Orbax's manager, which would wait for all processes."""
    import orbax.checkpoint as ocp

    manifest = _manifest(checkpoint)
    if manifest["step"] != step:
        raise _Unusable(f"is that of step {manifest['step']}, renamed")
    wanted, there = _described(like), manifest["arrays"]
    there = {name: about for name, about in there.items() if name.partition("/")[0] in like}
    for name in (*wanted, *there):
        found, expected = (_shown(described.get(name)) for described in (there, wanted))
        if found != expected:
            raise _Unusable(f"is another model's ({name} is {found} there, {expected} here)")
    items = {}
    for name, tree in like.items():
        flat = _flat(tree)
        read = ocp.StandardCheckpointHandler().restore(checkpoint / name, args=ocp.args.StandardRestore(flat))
        items[name] = jax.tree.unflatten(jax.tree.structure(tree), [read[path] for path in flat])
    for name, digest in digests(items).items():
        if digest != there[name]["digest"]:
            raise _Unusable(f"is damaged ({name} is not what was written)")
    return items


def _manifest(checkpoint: epath.Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    if storage.is_bucket(checkpoint) and not (checkpoint / _COMMITTED).is_file():
        raise _Unusable("is not whole (its writing was cut off, or goes on)")
    if not (checkpoint / "manifest").is_dir():
        raise _Unusable("is not whole (it has no manifest)")
    return ocp.JsonCheckpointHandler().restore(checkpoint / "manifest", args=ocp.args.JsonRestore())


def _items(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _ITEMS if getattr(state, name) is not None}


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return named(tree, separator=".")  # Orbax makes files of the names


def _described(items: dict[str, Any], digest: dict[str, str] | None = None) -> dict[str, dict]:
    """Shape and type of each array, as the manifest has them, with its digest where that is known."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} | ({"digest": digest[name]} if digest else {})
        for name, leaf in named(items).items()
    }


def _shown(about: dict | None) -> str:
    return "missing" if about is None else f"{about['dtype']}{about['shape']}"


def _put_aside(directory: epath.Path, step: int):
    """Renames what cannot be used, so that nothing is lost and its step is free."""
    aside = directory / f"{_ASIDE}{step}"
    number = 1
    while aside.exists():
        number += 1
        aside = directory / f"{_ASIDE}{step}-{number}"
    (directory / str(step)).rename(aside)
    print(f"sedd: it is kept as {aside.name}", file=sys.stderr)


def _cause(error: BaseException) -> str:
    """What went wrong at the bottom, in short: tensorstore adds its whole specification to its messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(storage.line_of(error).partition(" [")[0], 120, placeholder=" ...")
