"""Scores rows of text: draws of each row's bound, over all devices, kept as they come so that a job can go on."""

import functools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd import parallel, processes, storage
from sedd.data.workplace import write_whole
from sedd.diffusion import draws
from sedd.diffusion.likelihood import Draws, count_draws, level_draws, paired, time_draws
from sedd.diffusion.process import Absorbing
from sedd.diffusion.schedule import Schedule
from sedd.errors import UserError
from sedd.evaluation.protocols import Protocol
from sedd.evaluation.text import Scored
from sedd.network.network import Network

_DRAWS = "draws.f32"
_SYNC = 60  # seconds between copies into a bucket
UNIFORM_SIGMA = 12.0  # where the uniform bound ends at the earliest: there its prior is below 1e-5 nats a token


def ends(network: Network, schedule: Schedule) -> tuple[float, float]:
    """The noise from which the integral of the bound runs, and to which."""
    if isinstance(network.process, Absorbing):
        return 0.0, math.inf
    return float(schedule.sigma(0.0)), max(float(schedule.sigma(1.0)), UNIFORM_SIGMA)


def num_values(network: Network, num_draws: int) -> tuple[int, int]:
    """M and K: a row's record is Float32[M K], of each draw its level and width, and for each way to read the scores
    the diffusion and the reconstruction in nats a row. Free scores are read as they are and tightened."""
    return num_draws, 2 + 2 * (1 + (network.prediction == "score"))


def score(
    network: Network,
    schedule: Schedule,
    params: dict,
    scored: Scored,
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
    bind = scored.layout.binds_lengths or not isinstance(network.process, Absorbing)
    static = (network, schedule, protocol, num_draws, bind, mesh, ends(network, schedule))
    run = functools.partial(_records, *static, params, jax.random.key(seed))
    here = parallel.local_rows(mesh, size)
    for first in range(start, number, size):
        at = np.arange(first, first + size) % number  # one shape for all; what is over is dropped
        batch = parallel.spread(mesh, (scored.tokens[at[here]], scored.lengths[at[here]], at[here]), here, size)
        yield np.asarray(run(*batch))[: number - first]


@functools.partial(jax.jit, static_argnums=range(7))
def _records(network, schedule, protocol, num_draws, bind, mesh, limits, params, key, tokens, lengths, rows):
    """bind: tell the network the lengths; else what follows a short text stays masked: the model's exact marginal."""
    keys, process = draws.row_keys(key, rows), network.process
    free = jnp.arange(tokens.shape[1]) < lengths[:, None]
    both = network.prediction == "score"
    counts = protocol.whole and isinstance(process, Absorbing)
    pairs = counts and paired(num_draws)
    if not bind:
        tokens, lengths = process.hide(tokens, ~free), None
    told = lengths if lengths is None or not pairs else jnp.repeat(lengths, 2)
    stats = network.stats(params, lengths=told, masked_pairs=pairs, tightened=both)
    if counts:
        found = count_draws(process, stats, keys, tokens, num_draws, free, lengths)
    elif protocol.whole:
        found = level_draws(process, stats, keys, tokens, num_draws, *limits, free)
    else:
        times = (protocol.eps, protocol.stratum(rows), protocol.strata)
        found = time_draws(process, protocol.schedule(schedule), stats, keys, tokens, num_draws, *times)
    records = _flat(found)
    return jax.lax.with_sharding_constraint(records, NamedSharding(mesh, P()))


def _flat(found: Draws) -> jax.Array:
    """Float[B M K]."""
    terms = [found.level[:, None], found.width[:, None], *map(_with_axis, (found.diffusion, found.reconstruction))]
    return jnp.concatenate(terms, axis=1).transpose(2, 0, 1)


def _with_axis(term: jax.Array) -> jax.Array:
    return term[:, None] if term.ndim == 2 else term


def out_folder(path: str | Path) -> epath.Path:
    """The folder, made where it is missing. UserError if that cannot be done."""
    folder = storage.folder_of(path)
    if storage.is_bucket(folder):
        storage.check_writable(folder)
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be a folder ({error.strerror}); choose another --out") from None
    return folder


class Record:
    """What a job has scored, in a folder, so that it can go on after any interruption.

        job.json     all that its numbers depend on
        draws.f32    the records of its rows, little-endian, one after another

    A record cut off in the middle is made again. Without a folder all is held in memory only. Process 0 reads and
    writes the folder, and tells the others what is there. A context manager.
    """

    def __init__(self, folder: epath.Path | None, job: dict, shape: tuple[int, int]):
        """UserError if the folder holds another job."""
        self.shape, self._mirror, self._parts, self._synced = shape, None, [], time.monotonic()
        if folder is None:
            return
        there = np.zeros((0, *shape), np.float32)
        with processes.together():
            if processes.is_first():
                _claim(out_folder(folder), job)
                self._mirror = storage.Mirror(folder, (_DRAWS,))
                there = self._read()
        self._parts.append(processes.array_of_first(there))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._mirror is not None:
            self._mirror.close()

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def append(self, records: np.ndarray):
        """Float32[n M K]."""
        self._parts.append(records)
        if self._mirror is None:
            return
        with open(self._mirror.local / _DRAWS, "ab") as file:
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
        write_whole(file, job)
        return
    try:
        there = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: it is no JSON; remove {folder} and evaluate again") from None
    differs = [key for key in {**there, **job} if there.get(key) != job.get(key)]
    if differs:
        raise UserError(f"{folder} holds another evaluation: its {differs[0]} differs; choose another --out")
