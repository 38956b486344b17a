"""Scores rows of text: draws of each row's bound, over all devices, kept as they come so that a job can resume."""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd import parallel
from sedd.diffusion import keyed_random
from sedd.diffusion.likelihood import Draws, count_draws, level_draws, paired, time_draws
from sedd.diffusion.process import Absorbing, Process
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import ScoreStats
from sedd.errors import UserError
from sedd.evaluation.protocols import Protocol
from sedd.evaluation.text import ScoringRows
from sedd.network.network import Network
from sedd.runtime import disk, processes, storage

_DRAWS = "draws.f32"
_SYNC = 60  # seconds between copies into a bucket
KEPT = "; what is scored is kept"
UNIFORM_SIGMA = 12.0  # where the uniform bound ends at the earliest: there its prior is below 1e-5 nats a token


def sigma_limits(network: Network, schedule: Schedule) -> tuple[float, float]:
    """The noise from which the integral of the bound runs, and to which."""
    if isinstance(network.process, Absorbing):
        return 0.0, math.inf
    return float(schedule.sigma(0.0)), max(float(schedule.sigma(1.0)), UNIFORM_SIGMA)


def record_shape(network: Network, num_draws: int) -> tuple[int, int]:
    """M and K: a row's record is Float32[M K], of each draw its level and width, and for each way to read the scores
    the diffusion and the reconstruction in nats a row. Free scores are read as they are and tightened."""
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
    """The records of the rows from `start` on, a batch at a time: Float32[n M K]. They depend on no batch or device.

    Noise is keyed by (seed, row, draw). batch_size: rows at a time over all devices.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    number, (_, length) = len(scored.tokens), scored.tokens.shape
    size = min(batch_size or network.rows_at_once(length) * devices, number)
    size = -(-size // devices) * devices
    uses_lengths = scored.layout.masks_padding or not isinstance(network.process, Absorbing)
    static = (network, schedule, protocol, num_draws, uses_lengths, mesh, sigma_limits(network, schedule))
    run = functools.partial(_records, *static, params, keyed_random.root_key(seed))
    here = parallel.local_rows(mesh, size)
    for first in range(start, number, size):
        at = np.arange(first, first + size) % number  # one shape for all; what is over is dropped
        batch = parallel.shard_batch(mesh, (scored.tokens[at[here]], scored.lengths[at[here]], at[here]), here, size)
        yield np.asarray(run(*batch))[: number - first]


@functools.partial(jax.jit, static_argnums=range(7))
def _records(network, schedule, protocol, num_draws, uses_lengths, mesh, limits, params, key, tokens, lengths, rows):
    """bind: tell the network the lengths; else what follows a short text stays masked: the model's exact marginal."""
    process = network.process
    free = jnp.arange(tokens.shape[1]) < lengths[:, None]
    pairs = _counts(process, protocol) and paired(num_draws)
    if not uses_lengths:
        tokens, lengths = process.mask_tokens(tokens, ~free), None
    of_pairs = lengths if lengths is None or not pairs else jnp.repeat(lengths, 2)
    stats = network.stats(params, lengths=of_pairs, masked_pairs=pairs, tightened=network.prediction == "score")
    found = _draws(process, schedule, protocol, num_draws, limits, stats, key, tokens, rows, free, lengths)
    return jax.lax.with_sharding_constraint(_flat(found), NamedSharding(mesh, P()))


def _counts(process: Process, protocol: Protocol) -> bool:
    return protocol.is_bound and isinstance(process, Absorbing)


def _draws(process, schedule, protocol, num_draws, limits, stats, key, tokens, rows, free=None, lengths=None) -> Draws:
    keys = keyed_random.row_keys(key, rows)
    if _counts(process, protocol):
        return count_draws(process, stats, keys, tokens, num_draws, free, lengths)
    if protocol.is_bound:
        return level_draws(process, stats, keys, tokens, num_draws, *limits, free)
    times = (protocol.eps, protocol.stratum(rows), protocol.strata)
    return time_draws(process, protocol.schedule(schedule), stats, keys, tokens, num_draws, *times)


@functools.partial(jax.jit, static_argnums=range(5))
def _levels(process, schedule, protocol, num_draws, limits, key, rows):
    """The levels and widths of the draws of rows: Float32[n M 2]. They depend on no text and no network."""
    found = _draws(process, schedule, protocol, num_draws, limits, _no_stats, key, rows[:, None] * 0, rows)
    return jnp.stack([found.level, found.width], axis=-1).transpose(1, 0, 2)


def _no_stats(x: jax.Array, *_) -> ScoreStats:
    return ScoreStats(*[jnp.zeros(x.shape)] * 3)


def levels_of(
    network: Network, schedule: Schedule, protocol: Protocol, num_draws: int, seed: int, number: int
) -> np.ndarray:
    """Where the draws of the first rows lie: what the records of these rows begin with, Float32[number M 2]."""
    static = (network.process, schedule, protocol, num_draws, sigma_limits(network, schedule))
    return np.asarray(_levels(*static, keyed_random.root_key(seed), jnp.arange(number)))


def _flat(found: Draws) -> jax.Array:
    """Float[B M K]."""
    terms = [found.level[:, None], found.width[:, None], *map(_with_axis, (found.diffusion, found.reconstruction))]
    return jnp.concatenate(terms, axis=1).transpose(2, 0, 1)


def _with_axis(term: jax.Array) -> jax.Array:
    return term[:, None] if term.ndim == 2 else term


class ResumableDraws:
    """What a job has scored, in a folder, so that it can go on after any interruption.

        job.json     all that its numbers depend on
        draws.f32    the records of its rows, little-endian, one after another

    A record cut off in the middle is made again. Without a folder all is held in memory only. Process 0 reads, writes
    and holds the folder, and tells the others what is there. A context manager.
    """

    def __init__(
        self,
        folder: epath.Path | None,
        job: dict,
        shape: tuple[int, int],
        rows: int,
        levels: Callable[[int], np.ndarray],
    ):
        """rows: of the whole job; levels: of the first rows, as `levels_of` has them.

        UserError if the folder holds another job, more than this one, or rows of another; or another job is at work.
        """
        self.shape, self._folder, self._mirror, self._parts = shape, folder, None, []
        self._synced, self._held = time.monotonic(), contextlib.ExitStack()
        if folder is None:
            return
        there = np.zeros((0, *shape), np.float32)
        with contextlib.ExitStack() as held:
            with processes.together():
                if processes.is_first():
                    held.enter_context(storage.locked(folder))
                    with storage.user_errors(folder):
                        _claim(folder, job)
                        self._mirror = held.enter_context(storage.Mirror(folder, (_DRAWS,)))
                        there = self._read()
                    _check(folder, there, rows, levels)
            self._held = held.pop_all()
        self._parts.append(processes.broadcast_array_from_first(there))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._held.__exit__(*error)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def append(self, records: np.ndarray):
        """Float32[n M K]."""
        self._parts.append(records)
        if self._mirror is None:
            return
        with storage.user_errors(self._folder, KEPT), open(self._mirror.local / _DRAWS, "ab") as file:
            file.write(records.astype("<f4").tobytes())
        if time.monotonic() - self._synced > _SYNC:
            self._mirror.sync()
            self._synced = time.monotonic()

    def records(self) -> np.ndarray:
        """Of all rows scored so far, Float32[n M K]."""
        return np.concatenate([np.zeros((0, *self.shape), np.float32), *self._parts])

    def _read(self) -> np.ndarray:
        """The whole records that are there; what is cut off behind them goes."""
        file = self._mirror.local / _DRAWS
        if not file.exists():
            return np.zeros((0, *self.shape), np.float32)
        whole = file.stat().st_size // (4 * math.prod(self.shape))
        found = np.fromfile(file, "<f4", whole * math.prod(self.shape)).reshape(-1, *self.shape)
        os.truncate(file, found.nbytes)
        return found


def _claim(folder: epath.Path, job: dict):
    """Writes down which job the folder is for, or holds that it is for this one."""
    file = folder / "job.json"
    if not file.exists():
        if not storage.is_empty(folder):
            raise UserError(f"{folder} is not empty and holds no evaluation; choose another --out")
        disk.write_json_atomic(file, json.dumps(job))
        return
    try:
        there = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: it is no JSON; remove {folder} and evaluate again") from None
    differs = [key for key in {**there, **job} if there.get(key) != job.get(key)]
    if differs:
        raise UserError(f"{folder} holds another evaluation: its {differs[0]} differs; choose another --out")


def _check(folder: epath.Path, there: np.ndarray, rows: int, levels: Callable[[int], np.ndarray]):
    """UserError unless each record is that of its row, by where its draws lie: two jobs may have written the file."""
    anew = f"remove {folder} and evaluate again"
    if len(there) > rows:
        raise UserError(f"{folder} holds the records of {len(there)} rows, and this evaluation has {rows}; {anew}")
    if len(there):
        close = np.isclose(there[..., :2], levels(len(there)), rtol=1e-3, atol=1e-5).all((1, 2))
        if not close.all():
            raise UserError(f"{folder} holds a record that is not that of row {int(close.argmin())}; {anew}")
