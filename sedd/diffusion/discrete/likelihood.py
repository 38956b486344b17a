"""Bounds on the negative log-likelihood (NLL bounds, negative ELBOs), from the StatsFn of any model.

-log p(x0) <= prior + diffusion + reconstruction, in two forms:

by noise level, for both processes: p is the distribution of the reverse process that starts in pi at noise `high`,
follows the scores down to noise `low`, and takes one step from there to 0 (SEDD, theorem 3.6);

by mask count, for the absorbing process: p is the distribution of decoding one token at a time in a uniformly random
order, the network conditioned on the number of masks only. That is the first form with `low` 0 and `high` infinite,
averaged over all noise levels that mask the same number (Ou et al., arXiv 2406.03736): nothing is cut off, and the
draws have less variance;

in discrete time, for the absorbing process: p is the distribution of the ancestral sampler in T steps, which draws the
tokens of a step independently (MDLM, arXiv 2406.07524, equation 8). It falls to the second form as T grows.

A network of blocks is bounded block after block, each given those before (`sedd.diffusion.discrete.blocks`): fields
named `block_size` are the tokens of a block, 0: all of a row.
"""

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.bounds import Bound, BoundTerms, Draws, in_halves, in_stratum
from sedd.diffusion.discrete.blocks import block_keys, by_token, num_blocks, of_rows, split
from sedd.diffusion.discrete.loss import count_loss, denoising_loss, masked_loss
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.discrete.score import ScoreStats, StatsFn
from sedd.diffusion.schedule import Schedule

MIN_HIGH = 12.0  # least upper limit of sigma without a mask: there the prior is below 1e-5 nats a token


def sigma_bound(
    process: Process,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    u: jax.Array,
    low: float = 0.0,
    high: float = math.inf,
    free: jax.Array | None = None,
) -> BoundTerms:
    """One draw of the bound, at one noise level a row; unbiased when u is uniform on [0, 1).

    It bounds the negative log-likelihood of the reverse process from `high` to `low` followed by one step to 0. The
    integral runs over the corruption probability 1 - alpha, between its values at `low` and `high`: evenly for the
    absorbing process, more densely at low noise for the uniform one. For the absorbing process with `low` 0 and `high`
    infinite the bound is complete, with prior and reconstruction 0.

    keys: Key[B]; x0: Int[B L]; u: Float[B], selects the noise level; free: Bool[B L], False where a token is given and
    not scored.
    """
    free = jnp.ones(x0.shape, bool) if free is None else free
    sigma, weight = _noise_at(process, u, low, high)

    def row_sum(keys, sigma, term):
        x = jnp.where(free, process.corrupt(keys, x0, sigma[:, None]), x0)
        return jnp.sum(jnp.where(free, term(stats_fn(x, sigma, x0), x, x0, sigma[:, None]), 0.0), axis=-1)

    diffusion = weight * row_sum(keyed_random.fold(keys, 0), sigma, process.score_entropy)
    if low > 0:
        reconstruction = row_sum(keyed_random.fold(keys, 1), jnp.full_like(sigma, low), process.reconstruction)
    else:
        reconstruction = jnp.zeros_like(diffusion)
    prior = process.prior_divergence(high) * jnp.sum(free, axis=-1).astype(diffusion.dtype)
    return BoundTerms(prior, diffusion, reconstruction)


@dataclasses.dataclass(frozen=True)
class TokenBound(Bound):
    """A bound of a jump process."""

    process: Process

    def blank(self, num_rows, length):
        def stats(x, *_):
            return ScoreStats(*[jnp.zeros(x.shape)] * 3)

        return stats, jnp.zeros((num_rows, length), jnp.int32)


@dataclasses.dataclass(frozen=True)
class MaskCountBound(TokenBound):
    """The bound on decoding in random order: the cross-entropy at stratified mask counts, for a process with a mask.

    If the number of strata of a half is even, its draws come in antithetic pairs: k and n + 1 - k of a row's n free
    tokens, which mask every token once and one of them twice. The StatsFn is then called with pairs of rows 2i and
    2i + 1 that hold at most n + 1 masked free tokens together; otherwise with independent rows. Of blocks, each has a k
    of its own, and n counts its tokens. With blocks of one token it is no bound but the negative log-likelihood itself,
    by one call.

    The bound is that of the network conditioned on `process.sigma_from_mask_ratio` of each state. A position that is
    masked in x0 stays masked: with free False there, the rows are part of a block whose other positions are unknown.
    """

    block_size: int = 0

    @property
    def likelihood_of(self):
        if not self.block_size:
            return "decoding one token at a time in random order, conditioned on the number of masked tokens"
        if self.block_size == 1:
            return "decoding one token at a time from left to right"
        return f"decoding blocks of {self.block_size} tokens from left to right, each in random order"

    def takes_pairs(self, num_draws):
        return num_draws % 4 == 0 and self.block_size != 1

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        process = cast(Absorbing, self.process)
        free = jnp.ones(x0.shape, bool) if free is None else free
        blocks = num_blocks(x0.shape[1], self.block_size)
        n = jnp.maximum(jnp.sum(split(free, blocks), axis=-1), 1)  # Int[B], or Int[B N] of blocks
        if self.block_size == 1:
            exact = count_loss(process, stats_fn, keys, x0, n, free, lengths).sum(-1)
            return in_halves(lambda *_: _of_counts(jnp.ones((1, len(x0))), exact[None]), keys, num_draws, 1)
        pairs = self.takes_pairs(num_draws)

        def at(keys, stratum, strata):
            u = in_stratum(stratum, strata, block_keys(keyed_random.fold(keys, 0), blocks))
            k = jnp.minimum(1 + (u * n.astype(u.dtype)).astype(jnp.int32), n)
            level = of_rows(u)
            rows = (keyed_random.fold(keys, 1), x0, k, free, lengths)
            if not pairs:
                loss = count_loss(process, stats_fn, *rows).sum(-1)[None]
                return _of_counts(level[None], loss)
            rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), rows)
            mirrored = jnp.arange(2 * len(n)) % 2 == 1
            n_of_pairs = jnp.repeat(n, 2, axis=0)
            odd = jnp.reshape(mirrored, (-1, *[1] * (n.ndim - 1)))
            k_of_pairs = jnp.where(odd, n_of_pairs + 1 - rows[2], rows[2])
            loss = count_loss(process, stats_fn, *rows[:2], k_of_pairs, *rows[3:], mirrored).sum(-1)
            loss = jnp.moveaxis(loss.reshape(*loss.shape[:-1], -1, 2), -1, 0)
            return _of_counts(jnp.stack([level, 1 - level]), loss)

        return in_halves(at, keys, num_draws, 2 if pairs else 1)


def _of_counts(level: jax.Array, loss: jax.Array) -> Draws:
    """Draws at even levels, without prior and reconstruction."""
    return Draws(level, jnp.ones_like(level), jnp.zeros_like(level), loss, jnp.zeros_like(loss))


@dataclasses.dataclass(frozen=True)
class DiscreteTimeBound(TokenBound):
    """The bound on `Tweedie` in T even steps of the mask ratio, for a process with a mask: MDLM's with T = `steps`.

    The step from the mask ratio i / T to (i - 1) / T unmasks each masked token with probability 1 / i, at a cost of its
    cross-entropy, and i is stratified over 1 .. T. Nothing is left out: at i = T all is masked, after i = 1 nothing.
    The tokens of a step are drawn independently, so that the bound exceeds that of decoding one token at a time; with
    one step it is the negative log-likelihood of independent tokens. The network is conditioned on
    `process.sigma_from_mask_ratio` of each state, as the samplers' is. MDLM, equation 8 with alpha = 1 - t.
    """

    steps: int
    block_size: int = 0

    def __post_init__(self):
        if self.process.mask_id is None:
            raise ValueError(f"DiscreteTimeBound needs the absorbing process, not {self.process}")
        if self.steps < 1:
            raise ValueError(f"DiscreteTimeBound needs at least one step, not {self.steps}")

    @property
    def likelihood_of(self):
        of_blocks = f", block after block of {self.block_size} tokens" if self.block_size else ""
        steps = "1 step" if self.steps == 1 else f"{self.steps:,} even steps of the mask ratio"
        return f"the sampler tweedie in {steps}{of_blocks}"

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        process = cast(Absorbing, self.process)
        free = jnp.ones(x0.shape, bool) if free is None else free
        blocks = num_blocks(x0.shape[1], self.block_size)

        def at(keys, stratum, strata):
            u = in_stratum(stratum, strata, block_keys(keyed_random.fold(keys, 0), blocks))
            ratio = jnp.minimum(1 + jnp.floor(u * self.steps), self.steps) / self.steps
            of_token = jnp.broadcast_to(by_token(ratio, x0.shape[1]), x0.shape)
            of_position = keyed_random.position_keys(keyed_random.fold(keys, 1), jnp.arange(x0.shape[1]))
            masked = free & keyed_random.bernoulli(of_position, of_token)
            loss = masked_loss(process, stats_fn, x0, masked, 1 / of_token, lengths).sum(-1)
            return _of_counts(of_rows(ratio)[None], loss[None])

        return in_halves(at, keys, num_draws, 1)


@dataclasses.dataclass(frozen=True)
class NoiseLevelBound(TokenBound):
    """The bound by noise levels from sigma `high` down to `low`: draws of `sigma_bound`, in equal strata of u."""

    low: float = 0.0
    high: float = math.inf

    @property
    def likelihood_of(self):
        return f"the reverse process from sigma {self.high:g} to {self.low:g}, and one step from there"

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        def at(keys, stratum, strata):
            u = in_stratum(stratum, strata, keyed_random.fold(keys, 0))
            bound = sigma_bound(self.process, stats_fn, keyed_random.fold(keys, 1), x0, u, self.low, self.high, free)
            sigma, weight = _noise_at(self.process, u, self.low, self.high)
            terms = (-jnp.expm1(-sigma), weight * jnp.exp(-sigma), *bound)
            return Draws(*(leaf[None] for leaf in terms))

        return in_halves(at, keys, num_draws, 1)


@dataclasses.dataclass(frozen=True)
class TimeLoss(TokenBound):
    """The denoising loss at times in [eps, 1], as papers report it: not a bound, but close to one.

    It is the integral over [eps, 1] divided by 1 - eps. The integral over [0, eps], the prior and the reconstruction
    are left out; the bounds include them. The draws are independent, each at a time in the row's stratum. strata:
    consecutive rows whose times are stratified over [eps, 1] together, a power of two; of blocks, each has a time of
    its own, and those at one place of consecutive rows are stratified.
    """

    schedule: Schedule
    eps: float
    strata: int
    block_size: int = 0

    likelihood_of = "not a bound: the loss that those papers report, without prior and reconstruction"

    def stratum(self, rows: jax.Array) -> jax.Array:
        """The stratum of each row, Int[B] -> Int[B]. Neighbours are far apart, so that a cluster spans the levels."""
        stride = round(self.strata * 0.618) | 1  # coprime to a power of two
        return rows * stride % self.strata

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        assert rows is not None  # their strata depend on them
        count = num_blocks(x0.shape[1], self.block_size)
        numbers = rows if count == 1 else rows[:, None] + jnp.arange(count)[None]

        def at(keys, *_):
            u = in_stratum(self.stratum(numbers), self.strata, block_keys(keyed_random.fold(keys, 0), count))
            t = self.eps + (1 - self.eps) * u
            noise = keyed_random.fold(keys, 1)
            loss = denoising_loss(self.process, self.schedule, stats_fn, noise, x0, t, free).sum(-1)
            t = of_rows(t)
            sigma, rate = self.schedule.sigma(t), self.schedule.rate(t)
            level, width = -jnp.expm1(-sigma), (1 - self.eps) * rate * jnp.exp(-sigma)  # width: d(1 - alpha) / du
            zeros = jnp.zeros_like(loss)
            return Draws(*(leaf[None] for leaf in (level, width, jnp.zeros_like(level), loss, zeros)))

        return in_halves(at, keys, num_draws, 1)


def bound_of(process: Process, schedule: Schedule, block_size: int = 0) -> Bound:
    """Returns the bound of a process that is trained with a schedule: by mask counts if it has a mask.

    block_size: tokens of a block, for a process with a mask only; 0: all of a row.
    """
    if process.mask_id is not None:
        return MaskCountBound(process, block_size)
    return NoiseLevelBound(process, float(schedule.sigma(0.0)), max(float(schedule.sigma(1.0)), MIN_HIGH))


def _noise_at(process: Process, u: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """The noise sigma at u in [0, 1], and the weight of the score entropy there. Float[B] -> Float[B], Float[B].

    The corruption probability is a power of a quantity that is linear in u. The third power, for the uniform process,
    puts more draws at low noise, where the variance of its score entropy is largest: the mean square of a draw grows
    there as 1 / (1 - alpha). On small distributions the third power left 0.4 of the standard deviation of even levels,
    the square 0.5.
    """
    power = 3 if process.mask_id is None else 1
    rounding = jnp.finfo(u.dtype).epsneg  # u below 1 can be rounded to 1, and both ends have weight 0
    u = jnp.clip(u, rounding, 1 - rounding)
    start = (-math.expm1(-low)) ** (1 / power)
    left = -math.expm1(math.log1p(-math.exp(-high)) / power)  # 1 minus the linear quantity at `high`
    span = 1 - left - start
    linear, complement = start + u * span, left + (1 - u) * span
    corruption, alpha = linear**power, -jnp.expm1(power * jnp.log1p(-complement))
    sigma = jnp.where(corruption < 0.5, -jnp.log1p(-corruption), -jnp.log(alpha))
    return sigma, power * linear ** (power - 1) * span / alpha
