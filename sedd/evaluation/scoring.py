"""Scores rows of text: draws of each row's bound, over all devices."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.likelihood import Draws, count_draws, level_draws, time_draws, uses_pairs
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.discrete.score import ScoreStats
from sedd.diffusion.schedule import Schedule
from sedd.evaluation.protocols import Protocol
from sedd.evaluation.text import ScoringRows
from sedd.network.network import Network
from sedd.runtime import parallel

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
