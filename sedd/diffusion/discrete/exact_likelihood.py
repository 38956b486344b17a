"""The exact likelihood of decoding in random order, and estimates of it from single orders (absorbing process).

The generative process: the free positions are unmasked one at a time, in a uniformly random order, each token drawn
from the Denoiser's distribution. The Denoiser is conditioned on the mask ratio of the row. With r_i(. | x_R) its
distribution at position i once the set R is unmasked,

    p(x) = mean over the orders o of prod_k r_{o_k}(x_{o_k} | x_{o_1}, ..., x_{o_{k-1}}),

given all that is not free. A learned Denoiser is in general not consistent with any single joint distribution, so its
orders disagree: the mean of their log-likelihoods, which the mask-count bound estimates
(`sedd.diffusion.discrete.likelihood`), is then below log p. With an exact Denoiser all orders agree, and both are the
conditional log-likelihood.
"""

import math

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Denoiser
from sedd.diffusion.discrete.process import Absorbing


def subset_log_likelihood(
    process: Absorbing,
    denoiser: Denoiser,
    x0: jax.Array,
    positions: jax.Array,
    batch_size: int = 64,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """The exact log-likelihood, in nats, of decoding n positions in uniformly random order given the rest. Float[].

    It is not a bound: the mask-count bound is a lower bound on it. All n! orders are summed over the sets of unmasked
    positions: G({}) = 1, G(R + i) = sum over i of G(R) r_i(x_i | x_R) / (n - |R|). That takes 2^n - 1 network rows, so
    the caller has to limit n.

    x0: Int[L], seen as it stands outside of `positions`: tokens, or masks that stay masked; positions: Int[n],
    distinct; batch_size: number of rows of one Denoiser call, at those n positions only; lengths: Int[], the valid
    length if it is not L. Pure; n and batch_size are static under jit.
    """
    n = positions.shape[0]
    if n == 0:
        return jnp.zeros(())
    log_r = _log_r_of_subsets(process, denoiser, x0, positions, batch_size, lengths)
    subsets, bits = jnp.arange(2**n)[:, None], (1 << jnp.arange(n))[None]
    contains = (subsets & bits) > 0
    before = subsets & ~bits  # each set without each of its members
    remaining = n + 1 - jnp.sum(contains, axis=-1, keepdims=True, dtype=log_r.dtype)
    step = log_r[before, jnp.arange(n)[None]] - jnp.log(remaining)

    def grow(_, log_g):  # iteration k computes log G of the sets of k members
        grown = jax.nn.logsumexp(jnp.where(contains, log_g[before] + step, -jnp.inf), axis=-1)
        return grown.at[0].set(0.0)

    empty_set = jnp.full(2**n, -jnp.inf, log_r.dtype).at[0].set(0.0)
    return jax.lax.fori_loop(0, n, grow, empty_set)[-1]


def _log_r_of_subsets(process, denoiser, x0, positions, batch_size, lengths) -> jax.Array:
    """log r of x0 at each position, for each set of unmasked positions. Float[at least 2^n - 1, n].

    Bit i of a row's index is set if positions[i] is unmasked; the values at unmasked positions are unspecified.
    """
    n = positions.shape[0]
    rows = min(batch_size, 2**n - 1)
    groups = -(-(2**n - 1) // rows)
    clean, queried = (jnp.broadcast_to(array, (rows, n)) for array in (x0[positions], positions))
    lengths = None if lengths is None else jnp.broadcast_to(lengths, rows)

    def log_r(subsets):
        unmasked = (subsets[:, None] >> jnp.arange(n)[None]) & 1 > 0
        x = jnp.broadcast_to(x0, (rows, *x0.shape)).at[:, positions].set(process.mask_tokens(clean, ~unmasked))
        log_clean = denoiser(x, process.sigma_from_mask_ratio(x, lengths), queried)
        return jnp.take_along_axis(log_clean, clean[..., None], axis=-1)[..., 0]

    return jax.lax.map(log_r, jnp.arange(groups * rows).reshape(groups, rows)).reshape(-1, n)


def order_log_likelihoods(
    process: Absorbing,
    denoiser: Denoiser,
    keys: jax.Array,
    x0: jax.Array,
    free: jax.Array,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """The log-likelihood, in nats, of each row's free positions along one uniformly random order. Float[B].

    Its exponential is an unbiased estimate of the likelihood of decoding in random order, which
    `subset_log_likelihood` computes exactly; its mean is the mask-count bound. Each network call is at one position of
    a row; the number of calls is the largest number of free positions of a row.

    keys: Key[B], one order each; x0: Int[B L]; free: Bool[B L], False where x0 is seen as it stands, masks too;
    lengths: Int[B], the valid lengths if they are not L. Pure; meant to be jitted.
    """
    ranks, count = keyed_random.ranks(keys, free), jnp.sum(free, axis=-1)

    def unmask_next(k, total):
        x = process.mask_tokens(x0, free & (ranks >= k))
        position = jnp.argmax(ranks == k, axis=-1)[:, None]
        log_clean = denoiser(x, process.sigma_from_mask_ratio(x, lengths), position)[:, 0]
        token = jnp.minimum(jnp.take_along_axis(x0, position, axis=-1), process.vocab_size - 1)
        return total + jnp.where(k < count, jnp.take_along_axis(log_clean, token, axis=-1)[:, 0], 0.0)

    return jax.lax.fori_loop(0, jnp.max(count), unmask_next, jnp.zeros(x0.shape[0]))


def importance_bound(log_likelihoods: jax.Array) -> jax.Array:
    """The importance-weighted bound of K orders: the log of their mean likelihood. Float[K ...] -> Float[...].

    In expectation a lower bound, in nats, on the log-likelihood of decoding in random order. It increases with K from
    the mask-count bound in `sedd.diffusion.discrete.likelihood` (K = 1) to the log-likelihood itself (Burda et al.,
    arXiv 1509.00519, theorem 1, with the order as the latent variable).
    """
    return jax.nn.logsumexp(log_likelihoods, axis=0) - math.log(log_likelihoods.shape[0])
