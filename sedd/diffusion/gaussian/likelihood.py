"""The NLL bound of Gaussian diffusion of tokens, from the LatentStatsFn of any model.

-log p(w) <= prior + diffusion + reconstruction, where p is the distribution of the reverse process that starts in
N(0, I) at noise `high`, follows E[z0 | z] down to noise `low`, and draws each token from p(x0_i | z) there. Any
function of z may stand for the mean and for p(x0_i | z), so that the bound is one at any `low`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.bounds import Bound, BoundTerms, Draws, in_halves, in_stratum
from sedd.diffusion.gaussian.loss import LatentStats, LatentStatsFn, noised
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import Schedule


def sigma_bound(
    process: Gaussian,
    stats_fn: LatentStatsFn,
    keys: jax.Array,
    z0: jax.Array,
    u: jax.Array,
    low: float,
    high: float,
    free: jax.Array | None = None,
) -> BoundTerms:
    """One draw of the bound, at one noise level a row; unbiased when u is uniform on [0, 1).

    The integral runs evenly over the log signal-to-noise ratio, in which the diffusion term is SNR / 2 times the
    squared error. keys: Key[B]; z0: Float[B L D], the clean latents of the tokens; u: Float[B], selects the noise
    level; low, high: positive and finite; free: Bool[B L], False where a token is given and not scored.
    """
    free = jnp.ones(z0.shape[:-1], bool) if free is None else free
    sigma, weight = noise_at(u, low, high)

    def row_sum(keys, sigma, term):
        stats = stats_fn(noised(process, keys, z0, sigma, free), sigma, z0)
        return jnp.sum(jnp.where(free, term(stats, sigma[:, None]), 0.0), axis=-1)

    diffusion = weight * row_sum(
        keyed_random.fold(keys, 0), sigma, lambda stats, sigma: process.squared_error(stats.error, sigma)
    )
    at_low = jnp.full_like(sigma, low)
    reconstruction = row_sum(keyed_random.fold(keys, 1), at_low, lambda stats, sigma: -stats.log_clean)
    prior = jnp.sum(jnp.where(free, process.prior_divergence(z0, high), 0.0), axis=-1)
    return BoundTerms(prior, diffusion, reconstruction)


BOUND_LOW = 0.3  # the least sigma of `bound_of`: below it the squared error costs networks more than the tokens


@dataclasses.dataclass(frozen=True)
class LatentBound(Bound):
    """The bound by noise levels from sigma `high` down to `low`: draws of `sigma_bound`, in equal strata of u."""

    process: Gaussian
    low: float
    high: float

    def __post_init__(self):
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"the bound needs 0 < low < high, both finite, not {self.low}, {self.high}")

    @property
    def likelihood_of(self):
        return f"the reverse process from sigma {self.high:g} to {self.low:g}, and the tokens drawn there"

    def blank(self, num_rows, length):
        def stats(x, *_):
            return LatentStats(*[jnp.zeros(x.z.shape[:-1])] * 2)

        return stats, jnp.zeros((num_rows, length, self.process.width))

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        def at(keys, stratum, strata):
            u = in_stratum(stratum, strata, keyed_random.fold(keys, 0)).astype(x0.dtype)
            terms = sigma_bound(self.process, stats_fn, keyed_random.fold(keys, 1), x0, u, self.low, self.high, free)
            sigma, weight = noise_at(u, self.low, self.high)
            draw = (-jnp.expm1(-sigma), weight * jnp.exp(-sigma), *terms)
            return Draws(*(leaf[None] for leaf in draw))

        return in_halves(at, keys, num_draws, 1)


def bound_of(process: Gaussian, schedule: Schedule, low: float = 0.0) -> LatentBound:
    """Returns the bound of a process that is trained with a schedule.

    low: the noise at which it passes to the tokens; 0: BOUND_LOW, or the schedule's lowest where that is more.
    """
    lowest, high = (float(schedule.sigma(t)) for t in (0.0, 1.0))
    return LatentBound(process, low or max(lowest, min(BOUND_LOW, high / 2)), high)


def noise_at(u: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """The noise sigma at u in [0, 1], even in log SNR between `low` and `high`, and d sigma / du. Float[B] twice."""
    start, end = (sigma + math.log(-math.expm1(-sigma)) for sigma in (low, high))
    ratio = start + (end - start) * u
    return jax.nn.softplus(ratio), (end - start) * jax.nn.sigmoid(ratio)
