"""The function type at which networks, losses and bounds of latents meet, and the training losses.

    LatentStatsFn: (x: Latent, sigma: Float[B], z0: Float[B L D]) -> LatentStats of Float[B L]

The function is made for the tokens of one batch, and z0 are their clean latents. x has no memory: where a network is
conditioned on its own last answer (self-conditioning), the function calls it twice.
All losses return a number for each position.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Denoiser, Latent
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import Schedule

LatentStatsFn = Callable[[Latent, jax.Array, jax.Array], "LatentStats"]


class LatentStats(NamedTuple):
    """What losses and bounds need of a position. Each Float[B L]."""

    error: jax.Array  # |z0 - E[z0 | z]|^2
    log_clean: jax.Array  # log p(x0_i | z) of the token


def stats_from(denoiser: Denoiser, table: jax.Array, tokens: jax.Array) -> LatentStatsFn:
    """The LatentStatsFn of a Denoiser over embeddings. table: Float[V D]; tokens: Int[B L], those of z0."""

    def stats(x, sigma, z0):
        log_clean = denoiser(x, sigma, None)
        return statistics(jnp.exp(log_clean) @ table, log_clean, z0, tokens)

    return stats


def statistics(mean: jax.Array, log_clean: jax.Array, z0: jax.Array, tokens: jax.Array) -> LatentStats:
    """The statistics of an answer. mean, z0: Float[B L D]; log_clean: Float[B L V], normalised; tokens: Int[B L]."""
    error = jnp.sum((z0 - mean) ** 2, axis=-1)
    return LatentStats(error, jnp.take_along_axis(log_clean, tokens[..., None], axis=-1)[..., 0])


def noised(
    process: Gaussian, keys: jax.Array, z0: jax.Array, sigma: jax.Array, free: jax.Array | None = None
) -> Latent:
    """The state at noise sigma, without memory. keys: Key[B]; z0: Float[B L D]; sigma: Float[B]; free: Bool[B L].

    Where not free, a latent is given: it has no noise, and is its own memory, as in sampling.
    """
    z = process.perturb(keys, z0, sigma)
    if free is None:
        return Latent(z, jnp.zeros_like(z))
    return Latent(jnp.where(free[..., None], z, z0), jnp.where(free[..., None], 0.0, z0))


def denoising_loss(
    process: Gaussian,
    schedule: Schedule,
    stats_fn: LatentStatsFn,
    keys: jax.Array,
    z0: jax.Array,
    t: jax.Array,
    free: jax.Array | None = None,
) -> jax.Array:
    """The integrand of the bound at the times t, nats: the squared error, weighted by -SNR'(t) / 2.

    Its mean over t uniform on [0, 1] is the diffusion term between sigma(0) and sigma(1) (Kingma et al., arXiv
    2107.00630). keys: Key[B]; z0: Float[B L D]; t: Float[B]; free: Bool[B L], False where a latent is given: neither
    noised nor scored. Returns Float[B L].
    """
    sigma = schedule.sigma(t)
    stats = stats_fn(noised(process, keys, z0, sigma, free), sigma, z0)
    loss = schedule.rate(t)[:, None] * process.squared_error(stats.error, sigma[:, None])
    return loss if free is None else jnp.where(free, loss, 0.0)


def cross_entropy_loss(
    process: Gaussian,
    stats_fn: LatentStatsFn,
    keys: jax.Array,
    z0: jax.Array,
    sigma: jax.Array,
    free: jax.Array | None = None,
) -> jax.Array:
    """-log p(x0_i | z) of each token at noise sigma: no bound, with the same minimiser at each noise level.

    Dieleman et al., arXiv 2211.15089, section 3.2. Arguments and result as of `denoising_loss`.
    """
    loss = -stats_fn(noised(process, keys, z0, sigma, free), sigma, z0).log_clean
    return loss if free is None else jnp.where(free, loss, 0.0)


class Regression(NamedTuple):
    """A noisy state and what Diffusion-LM's regression asks for. Each Float[B L D] but for the state."""

    x: Latent
    start: jax.Array  # the embedding with the schedule's lowest noise, from which the diffusion starts
    target: jax.Array  # the start, or at the first step the embedding without noise


def regression(
    process: Gaussian,
    schedule: Schedule,
    keys: jax.Array,
    z0: jax.Array,
    t: jax.Array,
    steps: int,
    free: jax.Array | None = None,
) -> Regression:
    """Draws what Diffusion-LM's objective regresses, as its code does (arXiv 2205.14217, appendix E).

    The embedding gets the noise of sigma(0) first, then that from sigma(0) to sigma(t). The target of E[z0 | z] is the
    former, but for t below 1 / steps, where it is the embedding. Arguments as of `denoising_loss`.
    """
    low, sigma = jnp.broadcast_to(schedule.sigma(jnp.zeros_like(t)), t.shape), schedule.sigma(t)
    start = process.perturb(keyed_random.fold(keys, 0), z0, low)
    if free is not None:
        start = jnp.where(free[..., None], start, z0)
    x = noised(process, keyed_random.fold(keys, 1), start, sigma - low, free)
    return Regression(x, start, jnp.where(t[:, None, None] < 1 / steps, z0, start))
