"""Scores rows of text: draws of each row's bound, over all devices, saved batch by batch so that a job can resume."""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.likelihood import Draws, count_draws, level_draws, time_draws, uses_pairs
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.discrete.score import ScoreStats
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.evaluation.protocols import Protocol
from sedd.evaluation.text import ScoringRows
from sedd.network.network import Network
from sedd.runtime import disk, parallel, processes, storage

_DRAWS = "draws.f32"
_SYNC = 60  # seconds between copies into a bucket
KEPT = "; what is scored is kept"
MIN_UNIFORM_SIGMA = 12.0  # least upper limit of the uniform bound: there its prior is below 1e-5 nats a token


def sigma_limits(network: Network, schedule: Schedule) -> tuple[float, float]:
    """The lower and upper limit of sigma in the integral of the bound."""
    if isinstance(network.process, Absorbing):
        return 0.0, math.inf
    return float(schedule.sigma(0.0)), max(float(schedule.sigma(1.0)), MIN_UNIFORM_SIGMA)


def record_shape(network: Network, num_draws: int) -> tuple[int, int]:
    """(M, K), the shape of a row's record Float32[M K].

    A draw's K values are its level, its width, and in nats a row the diffusion and the reconstruction term; where the
    network predicts unnormalised scores, each of the two terms for these and then for the tightened scores.
    """
    return num_draws, 2 + 2 * (1 + (network.prediction == "score"))


def score(
    network: Network,
    schedule: Schedule,
    params: dict,
    scored: ScoringRows,
    protocol: Protocol,
    num_draws: int,
    seed: int,
    mesh: Mesh,
    batch_size: int | None = None,
    start: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the records of the rows from `start` on, a batch at a time: Float32[n M K].

    Noise is keyed by (seed, row, draw), so that records are independent of batches and devices. batch_size: rows at a
    time over all devices.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    num_rows, length = scored.tokens.shape
    size = min(batch_size or network.rows_at_once(length) * devices, num_rows)
    size = -(-size // devices) * devices
    uses_lengths = scored.layout.masks_padding or not isinstance(network.process, Absorbing)
    static = (network, schedule, protocol, num_draws, uses_lengths, mesh, sigma_limits(network, schedule))
    run = functools.partial(_records, *static, params, keyed_random.root_key(seed))
    here = parallel.local_rows(mesh, size)
    for first in range(start, num_rows, size):
        at = np.arange(first, first + size) % num_rows  # one shape for all batches; surplus rows are dropped below
        batch = parallel.shard_batch(mesh, (scored.tokens[at[here]], scored.lengths[at[here]], at[here]), here, size)
        yield np.asarray(run(*batch))[: num_rows - first]


@functools.partial(jax.jit, static_argnums=range(7))
def _records(network, schedule, protocol, num_draws, uses_lengths, mesh, limits, params, key, tokens, lengths, rows):
    """The records of a batch, Float[B M K].

    uses_lengths: condition the network on the lengths; else the positions after a short text stay masked, which gives
    the model's exact marginal.
    """
    process = network.process
    free = jnp.arange(tokens.shape[1]) < lengths[:, None]
    pairs = _by_mask_count(process, protocol) and uses_pairs(num_draws)
    if not uses_lengths:
        tokens, lengths = process.mask_tokens(tokens, ~free), None
    row_lengths = lengths if lengths is None or not pairs else jnp.repeat(lengths, 2)
    stats = network.stats(params, lengths=row_lengths, masked_pairs=pairs, tightened=network.prediction == "score")
    draws = _draws(process, schedule, protocol, num_draws, limits, stats, key, tokens, rows, free, lengths)
    return jax.lax.with_sharding_constraint(_flat(draws), NamedSharding(mesh, P()))


def _by_mask_count(process: Process, protocol: Protocol) -> bool:
    return protocol.is_bound and isinstance(process, Absorbing)


def _draws(process, schedule, protocol, num_draws, limits, stats, key, tokens, rows, free=None, lengths=None) -> Draws:
    keys = keyed_random.row_keys(key, rows)
    if _by_mask_count(process, protocol):
        return count_draws(process, stats, keys, tokens, num_draws, free, lengths)
    if protocol.is_bound:
        low, high = limits
        return level_draws(process, stats, keys, tokens, num_draws, low, high, free)
    times = (protocol.eps, protocol.stratum(rows), protocol.strata)
    return time_draws(process, protocol.schedule(schedule), stats, keys, tokens, num_draws, *times)


@functools.partial(jax.jit, static_argnums=range(5))
def _levels(process, schedule, protocol, num_draws, limits, key, rows):
    """Levels and widths of the draws of rows, Float32[n M 2]. They are independent of text and network."""
    draws = _draws(process, schedule, protocol, num_draws, limits, _no_stats, key, rows[:, None] * 0, rows)
    return jnp.stack([draws.level, draws.width], axis=-1).transpose(1, 0, 2)


def _no_stats(x: jax.Array, *_) -> ScoreStats:
    zeros = jnp.zeros(x.shape)
    return ScoreStats(zeros, zeros, zeros)


def levels_of(
    network: Network, schedule: Schedule, protocol: Protocol, num_draws: int, seed: int, num_rows: int
) -> np.ndarray:
    """Levels and widths of the draws of the first rows, the first values of their records: Float32[num_rows M 2]."""
    static = (network.process, schedule, protocol, num_draws, sigma_limits(network, schedule))
    return np.asarray(_levels(*static, keyed_random.root_key(seed), jnp.arange(num_rows)))


def _flat(draws: Draws) -> jax.Array:
    """Draws as records, Float[B M K]."""
    terms = [draws.level[:, None], draws.width[:, None], *map(_with_axis, (draws.diffusion, draws.reconstruction))]
    return jnp.concatenate(terms, axis=1).transpose(2, 0, 1)


def _with_axis(term: jax.Array) -> jax.Array:
    return term[:, None] if term.ndim == 2 else term


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
                    held.enter_context(storage.locked(folder))
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
    file = folder / "job.json"
    if not file.exists():
        if not storage.is_empty(folder):
            raise UserError(f"{folder} is not empty and holds no evaluation; choose another --out")
        disk.write_text_atomic(file, json.dumps(job))
        return
    try:
        existing = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: it is no JSON; remove {folder} and evaluate again") from None
    differs = [key for key in {**existing, **job} if existing.get(key) != job.get(key)]
    if differs:
        raise UserError(f"{folder} holds another evaluation: its {differs[0]} differs; choose another --out")


def _check_records(folder: epath.Path, records: np.ndarray, rows: int, levels: Callable[[int], np.ndarray]):
    """UserError unless each record has the levels and widths of its row: two jobs may have written to the file."""
    remedy = f"remove {folder} and evaluate again"
    if len(records) > rows:
        raise UserError(f"{folder} holds the records of {len(records)} rows, and this evaluation has {rows}; {remedy}")
    if len(records):
        close = np.isclose(records[..., :2], levels(len(records)), rtol=1e-3, atol=1e-5).all((1, 2))
        if not close.all():
            raise UserError(f"{folder} holds a record that is not that of row {int(close.argmin())}; {remedy}")
