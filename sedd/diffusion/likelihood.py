"""Bounds on the negative log-likelihood, from the StatsFn of any model.

-log p(x0) <= prior + diffusion + reconstruction, in two forms:

by noise level, for both processes: p is the law of the reverse process that starts in pi at noise `high`, follows the
scores down to noise `low`, and takes one step from there to 0 (SEDD, theorem 3.6);

by counts of masked tokens, for the absorbing one: p is the law of decoding one token at a time in random order, the
network told only how many are masked. That is the first with `low` 0 and `high` infinite, its noise levels averaged
over all that mask the same number (Ou et al., arXiv 2406.03736): nothing is cut off, and draws scatter less.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.loss import count_loss, denoising_loss
from sedd.diffusion.process import Absorbing, Process
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import StatsFn


class Bound(NamedTuple):
    """The three terms of a bound. Each Float[B], nats a row."""

    prior: jax.Array
    diffusion: jax.Array
    reconstruction: jax.Array


class Draws(NamedTuple):
    """M draws of the terms of each row's bound that are random, in nats a row, stratified over the levels.

    Each half of the draws spans all levels on its own, with noise of its own: the difference of their means tells how
    far the mean of all is from its expectation. Statistics with an axis in front have it here too, before B.
    """

    level: jax.Array  # Float[M B], the share of touched tokens, 1 - alpha; for counts, the one that was rounded to k
    width: jax.Array  # Float[M B], how much of that share the draw stands for, times M; 1 where levels are even
    diffusion: jax.Array  # Float[M ... B]
    reconstruction: jax.Array  # Float[M ... B]


def sigma_bound(
    process: Process,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    level: jax.Array,
    low: float = 0.0,
    high: float = math.inf,
    free: jax.Array | None = None,
) -> Bound:
    """One draw of the bound at one noise level a row, unbiased when `level` is uniform on [0, 1).

    It bounds the law of the reverse process from `high` to `low` and the one step that follows. The integral runs over
    the touched share 1 - alpha, between its values at `low` and `high`: evenly for the absorbing process, more densely
    near no noise for the uniform one. For the absorbing process 0 and infinity leave nothing out, and prior and
    reconstruction are 0.

    keys: Key[B]; x0: Int[B L]; level: Float[B]; free: Bool[B L], False where a token is given and not scored.
    """
    free = jnp.ones(x0.shape, bool) if free is None else free
    sigma, weight = _noise_at(process, level, low, high)

    def scored(keys, sigma, term):
        x = jnp.where(free, process.perturb(keys, x0, sigma[:, None]), x0)
        return jnp.sum(jnp.where(free, term(stats_fn(x, sigma, x0), x, x0, sigma[:, None]), 0.0), axis=-1)

    diffusion = weight * scored(keyed_random.fold(keys, 0), sigma, process.score_entropy)
    if low > 0:
        reconstruction = scored(keyed_random.fold(keys, 1), jnp.full_like(sigma, low), process.reconstruction)
    else:
        reconstruction = jnp.zeros_like(diffusion)
    prior = process.prior_divergence(high) * jnp.sum(free, axis=-1).astype(diffusion.dtype)
    return Bound(prior, diffusion, reconstruction)


def level_draws(
    process: Process,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    num_draws: int,
    low: float = 0.0,
    high: float = math.inf,
    free: jax.Array | None = None,
) -> Draws:
    """Draws of `sigma_bound`, one noise level in each of equal strata; the prior is `process.prior_divergence`.

    keys: Key[B]; x0: Int[B L]; free: Bool[B L].
    """

    def at(keys, stratum, strata):
        level = _within(stratum, strata, keyed_random.fold(keys, 0))
        bound = sigma_bound(process, stats_fn, keyed_random.fold(keys, 1), x0, level, low, high, free)
        sigma, weight = _noise_at(process, level, low, high)
        terms = (-jnp.expm1(-sigma), weight * jnp.exp(-sigma), bound.diffusion, bound.reconstruction)
        return Draws(*(leaf[None] for leaf in terms))

    return _in_halves(at, keys, num_draws, 1)


def count_draws(
    process: Absorbing,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    num_draws: int,
    free: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> Draws:
    """Draws of the bound of decoding in random order: the cross-entropy at stratified numbers of masked tokens.

    Where the strata of a half are even in number, its draws come in antithetic pairs: k and n + 1 - k of a row's n free
    tokens, which mask every token, and one of them twice. `stats_fn` is then asked at rows 2i and 2i + 1 that hold at
    most n + 1 masks of free tokens together, so that a head can have a static size; else at one row a time.

    The bound is that of the network conditioned on `process.sigma_from_mask_ratio` of each state. A position that is
    masked in x0 stays masked: with free False there, the rows are part of a block whose other positions are unknown.

    keys: Key[B]; x0: Int[B L]; free: Bool[B L]; lengths: Int[B], the valid positions where the network is told them.
    """
    free = jnp.ones(x0.shape, bool) if free is None else free
    n = jnp.maximum(jnp.sum(free, axis=-1), 1)
    pairs = paired(num_draws)

    def at(keys, stratum, strata):
        share = _within(stratum, strata, keyed_random.fold(keys, 0))
        k = jnp.minimum(1 + (share * n.astype(share.dtype)).astype(jnp.int32), n)
        rows = (keyed_random.fold(keys, 1), x0, k, free, lengths)
        if not pairs:
            loss = count_loss(process, stats_fn, *rows).sum(-1)
            return Draws(share[None], jnp.ones((1, len(n))), loss[None], jnp.zeros_like(loss)[None])
        rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), rows)
        mirrored = jnp.arange(2 * len(n)) % 2 == 1
        both = jnp.where(mirrored, jnp.repeat(n, 2) + 1 - rows[2], rows[2])
        loss = count_loss(process, stats_fn, *rows[:2], both, *rows[3:], mirrored).sum(-1)
        loss = jnp.moveaxis(loss.reshape(*loss.shape[:-1], -1, 2), -1, 0)
        level = jnp.stack([share, 1 - share])
        return Draws(level, jnp.ones_like(level), loss, jnp.zeros_like(loss))

    return _in_halves(at, keys, num_draws, 2 if pairs else 1)


def time_draws(
    process: Process,
    schedule: Schedule,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    num_draws: int,
    eps: float,
    stratum: jax.Array,
    strata: int,
) -> Draws:
    """Draws of the denoising loss at times in [eps, 1], as papers report it: no bound, but close to one.

    The integral over [0, eps] is left out, that over [eps, 1] is divided by 1 - eps, and so are prior and
    reconstruction left out; `sigma_bound` and `count_draws` have them. Each draw takes a time in the row's stratum,
    Int[B], of so many; the draws are independent.

    keys: Key[B]; x0: Int[B L].
    """

    def at(keys, *_):
        t = eps + (1 - eps) * _within(stratum, strata, keyed_random.fold(keys, 0))
        loss = denoising_loss(process, schedule, stats_fn, keyed_random.fold(keys, 1), x0, t).sum(-1)
        share = -jnp.expm1(-schedule.sigma(t))
        width = (1 - eps) * schedule.rate(t) * jnp.exp(-schedule.sigma(t))  # d share, of one time's
        return Draws(*(leaf[None] for leaf in (share, width, loss, jnp.zeros_like(loss))))

    return _in_halves(at, keys, num_draws, 1)


def paired(num_draws: int) -> bool:
    """Whether `count_draws` takes so many draws in antithetic pairs."""
    return num_draws % 4 == 0


def _in_halves(at: Callable[..., Draws], keys: jax.Array, num_draws: int, each: int) -> Draws:
    """at(keys, stratum, strata), which makes `each` draws, over the strata of both halves; one half if M is odd."""
    halves = 2 if num_draws % 2 == 0 else 1
    strata = num_draws // halves

    def one(number):
        half, stratum = number // (strata // each), number % (strata // each)
        return at(keyed_random.fold(keyed_random.fold(keys, half), stratum), stratum, strata)

    found = jax.lax.map(one, jnp.arange(num_draws // each))
    return jax.tree.map(lambda leaf: leaf.reshape(num_draws, *leaf.shape[2:]), found)


def _noise_at(process: Process, level: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """The noise at a level in [0, 1], and the weight of the score entropy there. Float[B] -> Float[B], Float[B].

    The touched share is a power of a quantity that runs evenly. For the uniform process that puts more levels near no
    noise, where its score entropy scatters: the mean square of a draw grows there as the inverse of the share. On small
    laws the third power left 0.4 of the even levels' standard deviation, the square 0.5.
    """
    power = 1 if isinstance(process, Absorbing) else 3
    rounding = jnp.finfo(level.dtype).epsneg  # a draw below 1 can be rounded to it, and either end has no weight
    level = jnp.clip(level, rounding, 1 - rounding)
    start = (-math.expm1(-low)) ** (1 / power)
    left = -math.expm1(math.log1p(-math.exp(-high)) / power)  # what the even quantity lacks of 1 at `high`
    span = 1 - left - start
    even, lacking = start + level * span, left + (1 - level) * span
    share, alpha = even**power, -jnp.expm1(power * jnp.log1p(-lacking))
    sigma = jnp.where(share < 0.5, -jnp.log1p(-share), -jnp.log(alpha))
    return sigma, power * even ** (power - 1) * span / alpha


def _within(stratum: jax.Array, strata: int, keys: jax.Array) -> jax.Array:
    """Uniform on a stratum of [0, 1), one draw a key, in the default precision. Int[] or Int[B], Key[B] -> Float[B]."""
    dtype = jnp.result_type(float)
    return (jnp.asarray(stratum, dtype) + keyed_random.uniform(keys, dtype)) / strata
