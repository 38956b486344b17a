"""The training losses: the score entropy at times t or at mask counts k, and the cross-entropy of the posterior.

All return a number for each token. The sum of the score entropy over a row is an unbiased estimate of that row's bound,
in nats; the cross-entropy bounds nothing, and has the same minimiser.
"""

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.blocks import block_keys, by_token
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.discrete.score import PosteriorFn, StatsFn
from sedd.diffusion.schedule import Schedule


def denoising_loss(
    process: Process,
    schedule: Schedule,
    stats_fn: StatsFn,
    keys: jax.Array,
    x0: jax.Array,
    t: jax.Array,
    free: jax.Array | None = None,
) -> jax.Array:
    """The denoising score entropy at the times t, weighted by the rate; SEDD, equation 10.

    keys: Key[B]; x0: Int[B L]; t: Float[B], or Float[B N], of each of the N blocks of a row; the StatsFn then gets
    sigma as Float[B L]; free: Bool[B L], False where a token is given: not corrupted, not scored.
    Returns Float[B L], nats.
    """
    t = jnp.maximum(t, jnp.finfo(t.dtype).epsneg)  # at 0 there is no noise, and the score is unbounded
    of_token = by_token(t, x0.shape[1])
    sigma = schedule.sigma(of_token)
    x = _corrupted(process, keys, x0, sigma, free)
    entropy = process.score_entropy(stats_fn(x, sigma if t.ndim > 1 else sigma[:, 0], x0), x, x0, sigma)
    loss = schedule.rate(of_token) * entropy
    return loss if free is None else jnp.where(free, loss, 0.0)


def cross_entropy_loss(
    process: Process,
    posterior_fn: PosteriorFn,
    keys: jax.Array,
    x0: jax.Array,
    sigma: jax.Array,
    free: jax.Array | None = None,
    max_weight: float = 1.0,
) -> jax.Array:
    """-log p(x0_i | x) of each token at noise sigma, its own noisy state included, with a bounded weight.

    The weight, min(1 / sqrt(1 - alpha), max_weight), is between 1, that of the plain cross-entropy, and that of the
    score entropy, which grows as 1 / (1 - alpha) at low noise, where few tokens are corrupted: the gradients of that
    vary too much. It depends on the noise level only, so that the minimiser is the posterior. Large uniform models are
    trained with the plain cross-entropy or close to it (von Ruette et al., arXiv 2512.10858; Zhu et al., 2510.22926).

    keys: Key[B]; x0: Int[B L]; sigma: Float[B]; free: as of `denoising_loss`. Returns Float[B L].
    """
    x = _corrupted(process, keys, x0, sigma[:, None], free)
    weight = jnp.minimum(jax.lax.rsqrt(-jnp.expm1(-sigma)), max_weight)
    loss = -weight[:, None] * posterior_fn(x, sigma, x0)
    return loss if free is None else jnp.where(free, loss, 0.0)


def _corrupted(process, keys, x0, sigma, free):
    """Draws the noisy tokens of each row, at noise Float[B 1] or Float[B L]; those that are not free stay clean."""
    x = process.corrupt(keys, x0, sigma)
    return x if free is None else jnp.where(free, x, x0)


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
    """The cross-entropy of k masked tokens out of each row's n free ones, times n / k (Ou et al., arXiv 2406.03736).

    With k uniform on 1 .. n the mean of a row's sum is the any-order autoregressive bound: the integral over all noise
    levels, from 0 to infinity. The StatsFn is conditioned on `process.sigma_from_mask_ratio`, a function of the number
    of masks in the row.

    keys: Key[B]; x0: Int[B L]; k: Int[B], or Int[B N], of each of the N blocks of a row, whose positions are then those
    that n counts; free: Bool[B L], False where a token is given, or masked and stays so; lengths: Int[B], the valid
    lengths if the network is conditioned on them; mirrored: Bool[B], True for rows that mask the last k positions of
    their random order instead of the first. Two rows with the same key, one of them mirrored, with k and n + 1 - k
    masks, mask every token once and one of them twice. Returns Float[B L], nats.
    """
    free = jnp.ones(x0.shape, bool) if free is None else free
    masked, n_over_k = _masked_at_counts(keys, k, free, mirrored)
    return masked_loss(process, stats_fn, x0, masked, n_over_k, lengths)


def masked_loss(
    process: Absorbing,
    stats_fn: StatsFn,
    x0: jax.Array,
    masked: jax.Array,
    weight: jax.Array,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """The weighted cross-entropy of the masked tokens of x0, by a StatsFn conditioned on the mask ratio.

    x0: Int[B L]; masked: Bool[B L]; weight: Float[B 1] or Float[B L]; lengths: as of `count_loss`. Returns Float[B L],
    nats, 0 where nothing is masked.
    """
    x = process.mask_tokens(x0, masked)
    sigma = process.sigma_from_mask_ratio(x, lengths)
    entropy = process.cross_entropy(stats_fn(x, sigma, x0), x, sigma[:, None])
    return jnp.where(masked, weight.astype(sigma.dtype) * entropy, 0.0)


def _masked_at_counts(keys, k, free, mirrored):
    """The positions that are masked, Bool[B L], and n / k, Float[B 1] or Float[B L]."""
    rows, length = free.shape
    count = k.size // rows  # of blocks in a row
    keys, k, free = block_keys(keys, count).ravel(), k.ravel(), free.reshape(rows * count, -1)
    n = jnp.maximum(jnp.sum(free, axis=-1), 1)  # the loss of a block without free positions is 0
    k = jnp.clip(k, 1, n)
    order = keyed_random.ranks(keys, free)
    if mirrored is not None:
        order = jnp.where(jnp.repeat(mirrored, count)[:, None], n[:, None] - 1 - order, order)
    masked = (order < k[:, None]) & free
    n_over_k = (n.astype(float) / k.astype(float)).reshape(rows, count)
    return masked.reshape(rows, length), by_token(n_over_k, length)
