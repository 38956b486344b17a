"""Checkpoints: Orbax, with a digest of every array that is verified when a checkpoint is restored.

Orbax detects truncated and missing arrays, but silently restores a changed byte, silently casts types, and never falls
back to an older checkpoint. A checkpoint is a folder named by its step:

    params/ ema/ optimizer/   the arrays, each by its path
    manifest/                 the step, its bound, and shape, type and digest of each array; without it the checkpoint
                              is not used
"""

import contextlib
import dataclasses
import functools
import json
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sedd.errors import UserError
from sedd.runtime import disk, parallel, processes, storage, trees
from sedd.training.step import TrainState

_ITEMS = ("params", "ema", "optimizer")  # stored separately, so that inference reads the parameters only
_COMMITTED = "commit_success.txt"  # Orbax writes it last in a bucket, where a folder cannot be renamed atomically
_DAMAGED_PREFIX = "damaged-"  # of the folder of an unusable checkpoint, once the run resumes from an older one


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of a run, in a folder that all processes share; each is written atomically.

    A context manager. Checkpoints are written in the background; the next `save` and the exit wait for it. config: the
    group `checkpoint`: the newest `keep` are kept, those at multiples of `keep_every` steps, and with `keep_best` the
    one with the lowest bound. All processes must call all methods.
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
        """Orbax's manager, created by the first `save`. Creating it removes what an interrupted save left."""
        import orbax.checkpoint as ocp  # slow to import, and not needed to sample from an exported model

        options = ocp.CheckpointManagerOptions(
            preservation_policy=_PreservationPolicy(self.config, self._bounds),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        # One device writes a small replicated array; by default Orbax has each device compile and write a slice of it.
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
        """The bound of each checkpoint that has one. Orbax does not remember them when another process resumes."""
        if not self.config.keep_best:
            return {}
        bounds = {}
        for step in steps_saved(self.directory):
            with contextlib.suppress(Exception):  # a damaged checkpoint is never the best
                bounds[step] = float(_manifest(self.directory / str(step))["bound"])
        return bounds

    def save(self, state: TrainState, bound: float | None = None):
        """Writes the state, unless its step is saved already. bound: on the validation split, in nats per token.

        UserError if this or the previous checkpoint could not be written; earlier checkpoints are kept.
        """
        import orbax.checkpoint as ocp

        step, items = int(state.step), items_of(state)
        with self._write_errors():
            if step in self._manager.all_steps():
                return
            arrays = {name: ocp.args.PyTreeSave(_flat(tree)) for name, tree in items.items()}
            manifest = {"step": step, "bound": bound, "arrays": _describe(items)}
            if bound is not None:
                self._bounds[step] = bound
            args = ocp.args.Composite(**arrays, manifest=ocp.args.JsonSave(manifest))
            self._manager.save(step, args=args, force=True)

    def add_bound(self, step: int, bound: float | None):
        """Adds the bound to a checkpoint that was saved without one. bound: nats per token; None: nothing is done."""
        if bound is None or step in self._bounds:
            return
        self._bounds[step] = bound
        with processes.together(), self._write_errors():
            if processes.is_first():
                manifest = _manifest(self.directory / str(step)) | {"bound": bound}
                disk.write_text_atomic(self.directory / str(step) / "manifest" / "metadata", json.dumps(manifest))

    def restore(self, like: TrainState) -> TrainState | None:
        """Returns the newest state that verifies, or None if there is no checkpoint. Newer ones are renamed.

        like: shapes, types and shardings, as `jax.ShapeDtypeStruct`. UserError if there are checkpoints and none
        verifies.
        """
        if processes.is_first():
            for number, complete in _steps(self.directory):
                if not complete:  # the next save of this step replaces it
                    message = f"sedd: the checkpoint of step {number} is incomplete: its write was interrupted"
                    print(message, file=sys.stderr)
        restored = _restore_newest(self.directory, items_of(like))
        if restored is None:
            return None
        newest, items, unusable = restored
        with processes.together():
            if processes.is_first():
                for number in unusable:  # the resumed run will save that step again
                    _rename_unusable(self.directory, number)
        step = parallel.put(np.int32(newest), like.step.sharding)
        return TrainState(step, items["params"], items.get("ema"), items["optimizer"])

    def finish(self, quiet: bool = False):
        """Waits until the last checkpoint is written. quiet: no UserError, since another one is being raised."""
        if "_manager" not in self.__dict__:
            return
        with contextlib.suppress(UserError) if quiet else contextlib.nullcontext(), self._write_errors():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _write_errors(self):
        """A block whose errors become a UserError; unfinished files are removed."""
        try:
            yield
        except Exception as error:  # of Orbax, its storage layer or the file system
            _join_writers()
            if processes.is_first() and not storage.is_bucket(self.directory):
                for part in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    with contextlib.suppress(OSError):
                        part.rmtree()
            raise UserError(
                f"a checkpoint could not be written to {self.directory} ({_cause(error)}); earlier ones are kept. "
                "Fix the cause, and the same command continues"
            ) from error


def _join_writers(timeout: float = 10):
    """Waits for Orbax's threads, which still write into the folder of the step when the first error is raised."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, timeout)  # Orbax's own `join` raises the error of the thread


@dataclasses.dataclass(frozen=True)
class _PreservationPolicy:
    """Orbax's policy: keeps the newest checkpoints, those of every `keep_every` steps, and that of the lowest bound."""

    config: ConfigDict
    bounds: dict[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """True for each checkpoint that is kept. context: of Orbax's interface; not used."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        bounds = {step: self.bounds[step] for step in steps if step in self.bounds}
        best = [min(bounds, key=lambda step: bounds[step])] if bounds else []
        kept = {*sorted(steps)[-self.config.keep :], *best}
        every = self.config.keep_every
        return [step in kept or bool(every and step % every == 0) for step in steps]


def restore_params(directory: epath.Path, like: dict, ema: bool, step: int | None = None) -> dict:
    """Returns the parameters of the newest checkpoint that verifies, or of `step`. ema: their moving average instead.

    Only reads, so that it may be called while a run writes. UserError if there is no usable checkpoint.
    """
    name = "ema" if ema else "params"
    while True:
        steps = processes.broadcast_from_first(steps_saved(directory)) if step is None else [step]
        try:
            restored = _restore_newest(directory, {name: like}, steps)
            break
        except UserError:  # a running job may have removed these while they were read, and written newer ones
            if step is not None or processes.broadcast_from_first(steps_saved(directory))[-1:] <= steps[-1:]:
                raise
    if restored is None:
        raise UserError(f"{directory} holds no checkpoint yet; train a little longer")
    return restored[1][name]


def steps_saved(directory: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in ascending order."""
    return [step for step, complete in _steps(directory) if complete]


def _steps(directory: epath.Path) -> list[tuple[int, bool]]:
    """Returns each step, and True if it is complete. On a disk an incomplete one has a temporary name: not listed."""
    if not directory.is_dir():
        return []
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    in_bucket = storage.is_bucket(directory)
    return [(step, not in_bucket or (directory / str(step) / _COMMITTED).is_file()) for step in steps]


def _restore_newest(
    directory: epath.Path, like: dict[str, Any], steps: list[int] | None = None
) -> tuple[int, dict[str, Any], list[int]] | None:
    """Returns the newest step that verifies, its requested items, and the newer steps, which do not verify.

    None if there is no checkpoint; UserError if there are checkpoints and none verifies. Prints the problem of each
    newer step.
    """
    problems: dict[int, str] = {}
    steps = processes.broadcast_from_first(steps_saved(directory)) if steps is None else steps
    for step in reversed(steps):
        items, problem = try_read(directory / str(step), step, like)
        problem = processes.first_problem(problem)
        if problem is None:
            assert items is not None  # no process has a problem
            if processes.is_first():
                for newer, why in problems.items():
                    print(f"sedd: the checkpoint of step {newer} {why}; going back to step {step}", file=sys.stderr)
            return step, items, list(problems)
        problems[step] = problem
    if problems:
        reasons = "; ".join(f"that of step {step} {why}" for step, why in problems.items())
        raise UserError(f"no checkpoint in {directory} can be used: {reasons}; restore one from a copy")
    return None


def try_read(checkpoint: epath.Path, step: int, like: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the items of `like` from one checkpoint, verified, and None; or None, and why it cannot be used."""
    _ignore_closed_event_loop()
    try:
        return _read(checkpoint, step, like), None
    except _UnusableCheckpoint as error:
        return None, str(error)
    except Exception as error:  # of Orbax, JSON or the file system, for a damaged file
        return None, f"is damaged ({_cause(error)})"


def _ignore_closed_event_loop():
    """Suppresses the unraisable error "Event loop is closed".

    When Orbax fails to read one array it abandons its reads of the others, whose event loop is closed by then.
    """
    previous = sys.unraisablehook
    if isinstance(previous, _ClosedEventLoopFilter):
        return
    sys.unraisablehook = _ClosedEventLoopFilter(previous)


class _ClosedEventLoopFilter:
    def __init__(self, previous: Callable[[Any], Any]):
        self._previous = previous

    def __call__(self, unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            self._previous(unraisable)


class _UnusableCheckpoint(ValueError):
    """The problem of a checkpoint that can be read but not used."""


def _read(checkpoint: epath.Path, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Returns the items of `like` from one checkpoint, verified. Orbax's manager would wait for all processes."""
    import orbax.checkpoint as ocp

    manifest = _manifest(checkpoint)
    if manifest["step"] != step:
        raise _UnusableCheckpoint(f"is that of step {manifest['step']}, renamed")
    saved = {name: about for name, about in manifest["arrays"].items() if name.partition("/")[0] in like}
    types = {name: f"{about['dtype']}{about['shape']}" for name, about in saved.items()}
    mismatch = trees.first_mismatch(types, trees.types(like))
    if mismatch is not None:
        raise _UnusableCheckpoint(f"is another model's ({mismatch})")
    items = {}
    for name, tree in like.items():
        flat = _flat(tree)
        read = ocp.StandardCheckpointHandler().restore(checkpoint / name, args=ocp.args.StandardRestore(flat))
        items[name] = jax.tree.unflatten(jax.tree.structure(tree), [read[path] for path in flat])
    for name, digest in trees.digests(items).items():
        if digest != saved[name]["digest"]:
            raise _UnusableCheckpoint(f"is damaged ({name} is not what was written)")
    return items


def _manifest(checkpoint: epath.Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    if storage.is_bucket(checkpoint) and not (checkpoint / _COMMITTED).is_file():
        raise _UnusableCheckpoint("is incomplete (its write was interrupted, or is in progress)")
    if not (checkpoint / "manifest").is_dir():
        raise _UnusableCheckpoint("is incomplete (it has no manifest)")
    return ocp.JsonCheckpointHandler().restore(checkpoint / "manifest", args=ocp.args.JsonRestore())


def items_of(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that are stored separately, by their names in a checkpoint."""
    return {name: getattr(state, name) for name in _ITEMS if getattr(state, name) is not None}


def _flat(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, as names of files."""
    return trees.named(tree, separator=".")


def _describe(items: dict[str, Any]) -> dict[str, dict]:
    """Returns the manifest's entry of each array: its shape, type and digest."""
    digests = trees.digests(items)
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digests[name]}
        for name, leaf in trees.named(items).items()
    }


def _rename_unusable(directory: epath.Path, step: int):
    """Renames an unusable checkpoint, so that nothing is lost and its step can be saved again."""
    target = directory / f"{_DAMAGED_PREFIX}{step}"
    number = 1
    while target.exists():
        number += 1
        target = directory / f"{_DAMAGED_PREFIX}{step}-{number}"
    (directory / str(step)).rename(target)
    print(f"sedd: it is kept as {target.name}", file=sys.stderr)


def _cause(error: BaseException) -> str:
    """Returns the root cause in short: tensorstore appends its full specification to its messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(storage.line_of(error).partition(" [")[0], 120, placeholder=" ...")
