"""The exact likelihood of decoding in random order, and what single orders say of it (absorbing process).

The generative process: the free positions are revealed one at a time, in a uniformly random order, each token drawn
from what a Denoiser believes of it. The Denoiser is told the noise of the row's own masked share. With r_i(. | x_R)
what it believes of position i once the set R is revealed,

    p(x) = mean over the orders o of prod_k r_{o_k}(x_{o_k} | x_{o_1}, ..., x_{o_{k-1}}),

given all that is not free. A learned Denoiser answers for no single law, so its orders disagree: the mean of their
logarithms, which the bound by counts in `sedd.diffusion.likelihood` estimates, is then below log p. With an exact
Denoiser all orders agree, and both are the conditional log-likelihood of the law.
"""

import math

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.process import Absorbing
from sedd.diffusion.score import Denoiser


def subset_log_likelihood(
    process: Absorbing,
    denoiser: Denoiser,
    x0: jax.Array,
    positions: jax.Array,
    batch_size: int = 64,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """The exact log-likelihood, in nats, of decoding n positions in uniformly random order given the rest. Float[].

    It is no bound; the bound by counts in `sedd.diffusion.likelihood` is one on it. All n! orders are summed over the
    sets of what is revealed: G(nothing) = 1, G(R with i) = sum over i of G(R) r_i(x_i | x_R) / (n - |R|). That takes
    2^n - 1 network rows, so the caller has to limit n.

    x0: Int[L], in which positions that are not told are seen as they stand: tokens, or masks that are never revealed;
    positions: Int[n], no two the same; batch_size: how many rows the Denoiser is asked at once, at those n positions
    only; lengths: Int[], the valid length if it is not L. Pure; n and batch_size are static under jit.
    """
    n = positions.shape[0]
    if n == 0:
        return jnp.zeros(())
    log_r = _log_r_of_subsets(process, denoiser, x0, positions, batch_size, lengths)
    subsets, bits = jnp.arange(2**n)[:, None], (1 << jnp.arange(n))[None]
    holds = (subsets & bits) > 0
    before = subsets & ~bits  # each set without each of its members
    left = n + 1 - jnp.sum(holds, axis=-1, keepdims=True, dtype=log_r.dtype)
    step = log_r[before, jnp.arange(n)[None]] - jnp.log(left)

    def grow(_, log_g):  # the k-th time, the sets of k members get their sums
        reached = jax.nn.logsumexp(jnp.where(holds, log_g[before] + step, -jnp.inf), axis=-1)
        return reached.at[0].set(0.0)

    nothing = jnp.full(2**n, -jnp.inf, log_r.dtype).at[0].set(0.0)
    return jax.lax.fori_loop(0, n, grow, nothing)[-1]


def _log_r_of_subsets(process, denoiser, x0, positions, batch_size, lengths) -> jax.Array:
    """log r of x0 at each position, by the set of those revealed. Float[at least 2^n - 1, n].

    Bit i of a row's index says that positions[i] is revealed; what it says of revealed positions is of no account.
    """
    n = positions.shape[0]
    rows = min(batch_size, 2**n - 1)
    groups = -(-(2**n - 1) // rows)
    clean, asked = (jnp.broadcast_to(array, (rows, n)) for array in (x0[positions], positions))
    lengths = None if lengths is None else jnp.broadcast_to(lengths, rows)

    def answers(subsets):
        revealed = (subsets[:, None] >> jnp.arange(n)[None]) & 1 > 0
        x = jnp.broadcast_to(x0, (rows, *x0.shape)).at[:, positions].set(process.mask_tokens(clean, ~revealed))
        log_clean = denoiser(x, process.sigma_from_mask_ratio(x, lengths), asked)
        return jnp.take_along_axis(log_clean, clean[..., None], axis=-1)[..., 0]

    return jax.lax.map(answers, jnp.arange(groups * rows).reshape(groups, rows)).reshape(-1, n)


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
    `subset_log_likelihood` has exactly; its mean is the bound by counts in `sedd.diffusion.likelihood`. Each call asks
    at one position of a row, and there are as many as the row with the most has free positions.

    keys: Key[B], one order each; x0: Int[B L]; free: Bool[B L], False where x0 is seen as it stands, masks too;
    lengths: Int[B], the valid lengths if they are not L. Pure; meant to be jitted.
    """
    ranks, count = keyed_random.ranks(keys, free), jnp.sum(free, axis=-1)

    def reveal(k, total):
        x = process.mask_tokens(x0, free & (ranks >= k))
        position = jnp.argmax(ranks == k, axis=-1)[:, None]
        log_clean = denoiser(x, process.sigma_from_mask_ratio(x, lengths), position)[:, 0]
        token = jnp.minimum(jnp.take_along_axis(x0, position, axis=-1), process.vocab_size - 1)
        return total + jnp.where(k < count, jnp.take_along_axis(log_clean, token, axis=-1)[:, 0], 0.0)

    return jax.lax.fori_loop(0, jnp.max(count), reveal, jnp.zeros(x0.shape[0]))


def importance_bound(log_likelihoods: jax.Array) -> jax.Array:
    """The importance-weighted bound of K orders: the logarithm of their mean likelihood. Float[K ...] -> Float[...].

    In expectation a lower bound on the log-likelihood of decoding in random order, in nats, which grows with K from the
    bound by counts in `sedd.diffusion.likelihood` (K = 1) to the likelihood itself (Burda et al., arXiv 1509.00519,
    theorem 1, with the order as the hidden variable).
    """
    return jax.nn.logsumexp(log_likelihoods, axis=0) - math.log(log_likelihoods.shape[0])
