"""The two function types that everything meets at, and what makes one of them from another.

    Denoiser: (x: Int[B L], sigma: Float[B], positions: Int[B P] | None) -> log_clean: Float[B P V]
    StatsFn:  (x: Int[B L], sigma: Float[B], x0: Int[B L]) -> ScoreStats of Float[B L]

A Denoiser says what it believes of a token when all the others are seen,

    log_clean[b, p, v] = log r_i(v),   r_i(v) = p(x0_i = v | the noisy x without i, at sigma),   i = positions[b, p],

normalised over the V clean tokens, at every sigma, 0 and infinity included; positions None asks for all L. For the
absorbing process it is asked under masks only. Samplers take a Denoiser; losses and bounds take a StatsFn, which holds
the three numbers that the score entropy needs of a token's concrete scores s_y = p(x with x_i := y) / p(x), however
they were computed. Neither knows of a network.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Denoiser = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
StatsFn = Callable[[jax.Array, jax.Array, jax.Array], "ScoreStats"]


class ScoreStats(NamedTuple):
    """What the score entropy needs of one token's scores; y runs over the clean tokens. Each Float[...]."""

    log_sum: jax.Array  # log sum_{y != x} s_y
    sum_log: jax.Array  # sum_{y != x} log s_y
    target: jax.Array  # log s_{x0}, 0 where x = x0


def score_stats(log_score: jax.Array, x: jax.Array, x0: jax.Array) -> ScoreStats:
    """The statistics of any log score, a free one too. Float[... V or S], Int[...], Int[...] -> Float[...].

    A mask column is left out where x is the mask; elsewhere the absorbing process has no use for the statistics.
    """
    others = ~jax.nn.one_hot(x, log_score.shape[-1], dtype=bool)
    count = jnp.sum(others, axis=-1, dtype=log_score.dtype)
    target = jnp.take_along_axis(log_score, x0[..., None], axis=-1)[..., 0]

    def total(values):
        return jnp.sum(jnp.where(others, values, 0.0), axis=-1)

    # Summed about their mean: 50 000 terms of size 20 would lose the differences that the uniform loss is made of.
    mean = jax.lax.stop_gradient(total(log_score) / count)
    return ScoreStats(
        log_sum=jax.nn.logsumexp(jnp.where(others, log_score, -jnp.inf), axis=-1),
        sum_log=total(log_score - mean[..., None]) + count * mean,
        target=jnp.where(x == x0, 0.0, target),
    )


def clean_stats(process, log_clean: jax.Array, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> ScoreStats:
    """The statistics of the score that log r makes. Float[... V], Int[...], Int[...], Float[...] -> Float[...]."""
    here = jnp.minimum(x, process.vocab_size - 1)  # the mask has no clean column, and no use for one
    here = jnp.take_along_axis(log_clean, here[..., None], axis=-1)[..., 0]
    return score_stats(process.log_score(log_clean, here, sigma), x, x0)


def stats_from(process, denoiser: Denoiser) -> StatsFn:
    """The StatsFn of a Denoiser, by way of all B L V scores."""

    return lambda x, sigma, x0: clean_stats(process, denoiser(x, sigma, None), x, x0, sigma[:, None])


# Denoiser -> Denoiser: all that changes a model's opinion. No sampler knows of it.


def clamped(denoiser: Denoiser, tokens: jax.Array, free: jax.Array) -> Denoiser:
    """Sees the given tokens wherever a sampler has got to. tokens: Int[B L]; free: Bool[B L], False where given."""
    return lambda x, sigma, positions=None: denoiser(jnp.where(free, x, tokens), sigma, positions)


def condition_on_mask_ratio(process, denoiser: Denoiser, lengths: jax.Array | None = None) -> Denoiser:
    """Told `process.sigma_from_mask_ratio` of what it sees, whatever the caller says (absorbing process only).

    Put below `in_block`, it counts the masks of the whole block, as likelihoods do. lengths: Int[B], the valid ones.
    A trained network does better so, whatever the sampler: the bound of Tweedie's own steps too is lower, by .001 to
    .008 nats a token on two small networks (benchmarks/noise_conditioning.py).
    """
    return lambda x, sigma, positions=None: denoiser(x, process.sigma_from_mask_ratio(x, lengths), positions)


def in_block(denoiser: Denoiser, block: int, mask: int) -> Denoiser:
    """Shorter work in a block of the full length, whose other positions stay masked (absorbing process only).

    The believed law of the first positions is then the model's exact marginal.
    """

    def inner(x, sigma, positions=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
        x = jnp.pad(x, ((0, 0), (0, block - x.shape[-1])), constant_values=mask)
        return denoiser(x, sigma, positions)

    return inner


def edited(denoiser: Denoiser, edit: Callable[[jax.Array], jax.Array]) -> Denoiser:
    """Reshapes the law over clean tokens: edit(log_clean: Float[B P V]) -> log weights, normalised here.

    For the absorbing process an edit leaves the speed of revealing as it is; for the uniform one, whose moves depend
    on what is believed, it reshapes the target.
    """
    return lambda x, sigma, positions=None: jax.nn.log_softmax(edit(denoiser(x, sigma, positions)), axis=-1)


def temperature(log_clean: jax.Array, value: jax.Array | float) -> jax.Array:
    """The weights r^(1 / value)."""
    return log_clean / value


def nucleus(log_clean: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Keeps the likeliest tokens that together hold at least `top_p` of the mass (Holtzman et al., arXiv 1904.09751).

    Bisects for the threshold instead of sorting the vocabulary: 32 sums, which leave it within 2^-32 of the largest
    probability. At top_p = 1 everything stays.
    """
    p = jnp.exp(log_clean)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(p >= middle, p, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.max(p, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(high), high))
    return jnp.where((p >= low) | (top_p >= 1), log_clean, -jnp.inf)
