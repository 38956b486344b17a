"""The two function types at which networks, samplers and losses meet, and the conversions between them.

    Denoiser: (x: Int[B L], sigma: Float[B], positions: Int[B P] | None) -> log_clean: Float[B P V]
    StatsFn:  (x: Int[B L], sigma: Float[B], x0: Int[B L]) -> ScoreStats of Float[B L]

A Denoiser returns the distribution of each clean token given all other noisy tokens,

    log_clean[b, p, v] = log r_i(v),   r_i(v) = p(x0_i = v | the noisy x without i, at sigma),   i = positions[b, p],

normalised over the V clean tokens, at every sigma including 0 and infinity; positions None means all L. For the
absorbing process its outputs at positions that are not masked are unspecified. Samplers take a Denoiser. Losses and
bounds take a StatsFn, which returns the three statistics of a token's concrete scores s_y = p(x with x_i := y) / p(x)
that the score entropy needs, however the scores are computed. Neither type depends on a network.
A process is a `sedd.diffusion.discrete.process.Process`, whose file imports this one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Denoiser = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
StatsFn = Callable[[jax.Array, jax.Array, jax.Array], "ScoreStats"]


class ScoreStats(NamedTuple):
    """The statistics of one token's scores that the score entropy needs; y is over clean tokens. Each Float[...]."""

    log_sum: jax.Array  # log sum_{y != x} s_y
    sum_log: jax.Array  # sum_{y != x} log s_y
    target: jax.Array  # log s_{x0}, 0 where x = x0


def score_stats(log_score: jax.Array, x: jax.Array, x0: jax.Array) -> ScoreStats:
    """The statistics of any log score, normalised or not. Float[... V or S], Int[...], Int[...] -> Float[...].

    A mask column is excluded where x is the mask; elsewhere the absorbing process does not use the statistics.
    """
    others = ~jax.nn.one_hot(x, log_score.shape[-1], dtype=bool)
    count = jnp.sum(others, axis=-1, dtype=log_score.dtype)
    target = jnp.take_along_axis(log_score, x0[..., None], axis=-1)[..., 0]

    def total(values):
        return jnp.sum(jnp.where(others, values, 0.0), axis=-1)

    # Summed about their mean: a plain sum of 50 000 terms of size 20 rounds away the differences that the uniform
    # process's loss consists of.
    mean = jax.lax.stop_gradient(total(log_score) / count)
    return ScoreStats(
        log_sum=jax.nn.logsumexp(jnp.where(others, log_score, -jnp.inf), axis=-1),
        sum_log=total(log_score - mean[..., None]) + count * mean,
        target=jnp.where(x == x0, 0.0, target),
    )


def clean_stats(process, log_clean: jax.Array, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> ScoreStats:
    """The statistics of the score that log r implies. Float[... V], Int[...], Int[...], Float[...] -> Float[...]."""
    here = jnp.minimum(x, process.vocab_size - 1)  # the mask has no clean column and needs none
    here = jnp.take_along_axis(log_clean, here[..., None], axis=-1)[..., 0]
    return score_stats(process.log_score(log_clean, here, sigma), x, x0)


def stats_from(process, denoiser: Denoiser) -> StatsFn:
    """The StatsFn of a Denoiser. It computes all B L V scores."""
    return lambda x, sigma, x0: clean_stats(process, denoiser(x, sigma, None), x, x0, sigma[:, None])


# Denoiser -> Denoiser: every modification of a model's predictions. Samplers are independent of them.


def clamped(denoiser: Denoiser, tokens: jax.Array, free: jax.Array) -> Denoiser:
    """Replaces the given positions of x by their tokens. tokens: Int[B L]; free: Bool[B L], False where given."""

    def inner(x, sigma, positions=None):
        return denoiser(jnp.where(free, x, tokens), sigma, positions)

    return inner


def condition_on_mask_ratio(process, denoiser: Denoiser, lengths: jax.Array | None = None) -> Denoiser:
    """Replaces sigma by `process.sigma_from_mask_ratio(x)`, the noise level of x itself (absorbing process only).

    Applied inside `in_block`, it counts the masks of the full block, as likelihoods do. lengths: Int[B], the valid
    lengths. A trained network is better so conditioned, whatever the sampler: the bound of Tweedie's own steps is lower
    too, by .001 to .008 nats a token on two small networks (benchmarks/noise_conditioning.py).
    """

    def inner(x, sigma, positions=None):
        return denoiser(x, process.sigma_from_mask_ratio(x, lengths), positions)

    return inner


def in_block(denoiser: Denoiser, block: int, mask: int) -> Denoiser:
    """Pads shorter sequences with masks to the full block length (absorbing process only).

    The predicted distribution of the first positions is then the model's exact marginal.
    """

    def inner(x, sigma, positions=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
        x = jnp.pad(x, ((0, 0), (0, block - x.shape[-1])), constant_values=mask)
        return denoiser(x, sigma, positions)

    return inner


def edited(denoiser: Denoiser, edit: Callable[[jax.Array], jax.Array]) -> Denoiser:
    """Modifies the distribution over clean tokens: edit(log_clean: Float[B P V]) -> log weights, normalised here.

    For the absorbing process an edit does not change the rate of unmasking. For the uniform process, whose moves depend
    on the predicted distribution, it changes the target distribution.
    """

    def inner(x, sigma, positions=None):
        return jax.nn.log_softmax(edit(denoiser(x, sigma, positions)), axis=-1)

    return inner


def temperature(log_clean: jax.Array, value: jax.Array | float) -> jax.Array:
    """The log of the weights r^(1 / value)."""
    return log_clean / value


def nucleus(log_clean: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Keeps the most likely tokens whose total mass is at least `top_p` (Holtzman et al., arXiv 1904.09751).

    Bisects for the threshold instead of sorting the vocabulary: 32 sums, which determine it to within 2^-32 of the
    largest probability. At top_p = 1 all tokens are kept.
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
