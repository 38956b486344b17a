"""Bounds on the negative log-likelihood, by the noise-level integral.

-log p(x0) <= prior + diffusion + reconstruction, where p is the law of the reverse process that starts in pi at noise
`high`, follows the scores down to noise `low`, and takes one step from there to 0 (SEDD, theorem 3.6).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import draws
from sedd.diffusion.process import Process
from sedd.diffusion.score import StatsFn


class Bound(NamedTuple):
    """The three terms of a bound. Each Float[B], nats a row."""

    prior: jax.Array
    diffusion: jax.Array
    reconstruction: jax.Array


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

    The integral runs over the touched share 1 - alpha, evenly between its values at `low` and `high`. For the absorbing
    process 0 and infinity leave nothing out, and prior and reconstruction are 0.

    keys: Key[B]; x0: Int[B L]; level: Float[B]; free: Bool[B L], False where a token is given and not scored.
    """
    free = jnp.ones(x0.shape, bool) if free is None else free
    rounding = jnp.finfo(level.dtype).epsneg  # a draw below 1 can be rounded to it, and either end has no weight
    level = jnp.clip(level, rounding, 1 - rounding)
    floor, span = -math.expm1(-low), math.exp(-low) - math.exp(-high)
    share, alpha = floor + level * span, math.exp(-high) + (1 - level) * span
    sigma = jnp.where(share < 0.5, -jnp.log1p(-share), -jnp.log(alpha))

    def scored(keys, sigma, term):
        x = jnp.where(free, process.perturb(keys, x0, sigma[:, None]), x0)
        return jnp.sum(jnp.where(free, term(stats_fn(x, sigma, x0), x, x0, sigma[:, None]), 0.0), axis=-1)

    diffusion = span / alpha * scored(draws.fold(keys, 0), sigma, process.score_entropy)
    if low > 0:
        reconstruction = scored(draws.fold(keys, 1), jnp.full_like(sigma, low), process.reconstruction)
    else:
        reconstruction = jnp.zeros_like(diffusion)
    prior = process.prior_divergence(high) * jnp.sum(free, axis=-1).astype(diffusion.dtype)
    return Bound(prior, diffusion, reconstruction)
