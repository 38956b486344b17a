"""The training losses: the score entropy at noise levels in time, and at counts of masked tokens.

Both give nats for each token, whose sum over a row is an unbiased estimate of that row's bound.
"""

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.process import Absorbing, Process
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import StatsFn


def denoising_loss(
    process: Process,
    schedule: Schedule,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    t: jax.Array,
    free: jax.Array | None = None,
) -> jax.Array:
    """The denoising score entropy at the times told, weighted by the rate; SEDD, equation 10.

    keys: Key[B]; x0: Int[B L]; t: Float[B]; free: Bool[B L], False where a token is given, kept and not scored.
    Returns Float[B L], nats.
    """
    t = jnp.maximum(t, jnp.finfo(t.dtype).epsneg)  # at 0 there is no noise, and the score has no limit
    sigma = schedule.sigma(t)
    x = process.perturb(keys, x0, sigma[:, None])
    x = x if free is None else jnp.where(free, x, x0)
    entropy = process.score_entropy(stats_fn(x, sigma, x0), x, x0, sigma[:, None])
    loss = schedule.rate(t)[:, None] * entropy
    return loss if free is None else jnp.where(free, loss, 0.0)


def count_loss(
    process: Absorbing,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    k: jax.Array,
    free: jax.Array | None = None,
    lengths: jax.Array | None = None,
    mirrored: jax.Array | None = None,
) -> jax.Array:
    """The cross-entropy of exactly k of each row's n free tokens, masked, times n / k (Ou et al., arXiv 2406.03736).

    With k uniform on 1 .. n the mean of a row's sum is the bound of decoding in random order: the integral over all
    noise levels, from 0 to infinity. A network that is conditioned on the noise level gets
    `process.sigma_from_mask_ratio`, a function of the number of masks in the row.

    keys: Key[B]; x0: Int[B L]; k: Int[B]; free: Bool[B L], False where a token is given, or masked and not to be
    revealed; lengths: Int[B], the valid positions where the network is told them; mirrored: Bool[B], rows that mask the
    last k of their random order instead of the first: of two rows with the same key, one of them mirrored, k and
    n + 1 - k masks cover every token, and one of them twice. Returns Float[B L], nats.
    """
    free = jnp.ones(x0.shape, bool) if free is None else free
    n = jnp.maximum(jnp.sum(free, axis=-1), 1)  # a row with nothing free costs nothing
    k = jnp.clip(k, 1, n)
    order = keyed_random.ranks(keys, free)
    if mirrored is not None:
        order = jnp.where(mirrored[:, None], n[:, None] - 1 - order, order)
    masked = (order < k[:, None]) & free
    x = process.mask_tokens(x0, masked)
    sigma = process.sigma_from_mask_ratio(x, lengths)
    entropy = process.cross_entropy(stats_fn(x, sigma, x0), x, sigma[:, None])
    weight = n.astype(sigma.dtype) / k.astype(sigma.dtype)
    return jnp.where(masked, weight[:, None] * entropy, 0.0)
