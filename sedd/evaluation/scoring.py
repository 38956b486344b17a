"""Scores rows of text: draws of each row's bound, over all devices."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd.diffusion import keyed_random
from sedd.diffusion.bounds import Bound, Draws
from sedd.evaluation.text import ScoringRows
from sedd.network.network import Network
from sedd.runtime import parallel
from sedd.trained import Trained


def record_shape(network: Network, num_draws: int) -> tuple[int, int]:
    """(M, K), the shape of a row's record Float32[M K].

    A draw's K values are its level, its width, and in nats a row the prior, the diffusion and the reconstruction term;
    where the network predicts unnormalised scores, each of the last two for these and then for the tightened scores.
    """
    return num_draws, 3 + 2 * (1 + network.has_unnormalised_scores)


def score(
    trained: Trained,
    bound: Bound,
    scored: ScoringRows,
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
    size = min(batch_size or trained.network.rows_at_once(length) * devices, num_rows)
    size = -(-size // devices) * devices
    static = (trained.network, bound, num_draws, trained.uses_lengths, scored.given, mesh)
    run = functools.partial(_records, *static, trained.all_params, keyed_random.root_key(seed))
    here = parallel.local_rows(mesh, size)
    for first in range(start, num_rows, size):
        at = np.arange(first, first + size) % num_rows  # one shape for all batches; surplus rows are dropped below
        batch = parallel.shard_batch(mesh, (scored.tokens[at[here]], scored.lengths[at[here]], at[here]), here, size)
        yield np.asarray(run(*batch))[: num_rows - first]


@functools.partial(jax.jit, static_argnums=range(6))
def _records(network, bound, num_draws, uses_lengths, given, mesh, params, key, tokens, lengths, rows):
    """The records of a batch, Float[B M K].

    uses_lengths: condition the network on the lengths; else the positions after a short text stay masked, which gives
    the model's exact marginal. given: the first tokens of each row that are not scored.
    """
    position = jnp.arange(tokens.shape[1])[None]
    within = position < lengths[:, None]
    free = within & (position >= given)
    if not uses_lengths:
        tokens, lengths = network.process.mask_tokens(tokens, ~within), None
    stats = bound_stats(network, bound, num_draws, params, tokens, lengths)
    clean = network.clean(params, tokens, lengths)
    draws = bound.draws(stats, keyed_random.row_keys(key, rows), clean, num_draws, free, lengths, rows)
    return jax.lax.with_sharding_constraint(_flat(draws), NamedSharding(mesh, P()))


def bound_stats(
    network: Network,
    bound: Bound,
    num_draws: int,
    params: dict,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    given: jax.Array | None = None,
) -> Callable[..., Any]:
    """The function of statistics with which `bound` takes its draws, of unnormalised scores with the tightened ones.

    tokens: Int[B L]; lengths: Int[B], the valid lengths; given: Bool[B L], True at given tokens.
    """
    pairs = bound.takes_pairs(num_draws)
    lengths = jnp.repeat(lengths, 2) if pairs and lengths is not None else lengths
    return network.bound_stats(params, tokens, lengths, given, pairs)


@functools.partial(jax.jit, static_argnums=range(3))
def _levels(bound, num_draws, length, key, rows):
    """Levels and widths of the draws of rows, Float32[n M 2]."""
    levels = bound.levels(keyed_random.row_keys(key, rows), num_draws, rows, length)
    return jnp.stack(levels, axis=-1).transpose(1, 0, 2)


def levels_of(bound: Bound, num_draws: int, length: int, seed: int, num_rows: int) -> np.ndarray:
    """Levels and widths of the draws of the first rows, the first values of their records: Float32[num_rows M 2]."""
    return np.asarray(_levels(bound, num_draws, length, keyed_random.root_key(seed), jnp.arange(num_rows)))


def _flat(draws: Draws) -> jax.Array:
    """Draws as records, Float[B M K]."""
    return jnp.concatenate([*map(_with_axis, draws)], axis=1).transpose(2, 0, 1)


def _with_axis(term: jax.Array) -> jax.Array:
    return term[:, None] if term.ndim == 2 else term
