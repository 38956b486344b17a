"""The function types at which networks, losses and bounds of tokens meet, and the conversions to them.

    StatsFn: (x: Int[B L], sigma: Float[B], x0: Int[B L]) -> ScoreStats of Float[B L]
    PosteriorFn: (x: Int[B L], sigma: Float[B], x0: Int[B L]) -> log p(x0_i | x): Float[B L]

A StatsFn returns the three statistics of a token's concrete scores s_y = p(x with x_i := y) / p(x) that the score
entropy needs, however the scores are computed; a PosteriorFn the posterior of the clean tokens, which the cross-entropy
needs. Neither depends on a network.
A process is a `sedd.diffusion.discrete.process.Process`, whose file imports this one.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion.denoiser import Denoiser

StatsFn = Callable[[jax.Array, jax.Array, jax.Array], "ScoreStats"]
PosteriorFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class ScoreStats(NamedTuple):
    """The statistics of one token's scores that the score entropy needs; y is over clean tokens. Each Float[...]."""

    log_sum: jax.Array  # log sum_{y != x} s_y
    sum_log: jax.Array  # sum_{y != x} log s_y
    target: jax.Array  # log s_{x0}, 0 where x = x0


class Sums(NamedTuple):
    """Sums over the columns y != x of each site, and the values of two columns. Each Float[...]."""

    log_sum: jax.Array  # log sum_{y != x} exp f(w_y)
    total: jax.Array  # sum_{y != x} f(w_y)
    own: jax.Array  # w_x; unspecified where x has no column
    target: jax.Array  # w_{x0}; unspecified where x0 has no column


class Columns(abc.ABC):
    """Log weights w_y of the tokens y at each site, Float[... V], of which no array need exist."""

    @abc.abstractmethod
    def sums(
        self,
        x: jax.Array,
        x0: jax.Array,
        function: Callable[..., jax.Array] | None = None,
        *numbers: jax.Array,
    ) -> Sums:
        """The sums that the statistics at the tokens x and x0, Int[...] each, are made of.

        function: f(w: Float[... C], *numbers: Float[...]) -> Float[... C], pointwise in the columns; None: w itself.
        numbers: of each site.
        """


@dataclasses.dataclass(frozen=True)
class ArrayColumns(Columns):
    """Log weights in an array. values: Float[... V]; a column of a mask is one of a token, that x is where it is."""

    values: jax.Array

    def sums(self, x, x0, function=None, *numbers):
        last = self.values.shape[-1] - 1
        own, target = (
            jnp.take_along_axis(self.values, jnp.minimum(tokens, last)[..., None], axis=-1)[..., 0]
            for tokens in (x, x0)
        )
        values = self.values if function is None else function(self.values, *numbers)
        others = ~jax.nn.one_hot(x, values.shape[-1], dtype=bool)
        count = jnp.sum(others, axis=-1, dtype=values.dtype)

        def total(values):
            return jnp.sum(jnp.where(others, values, 0.0), axis=-1)

        # Summed about their mean: a plain sum of 50 000 terms of size 20 rounds away the differences that the uniform
        # process's loss consists of.
        mean = jax.lax.stop_gradient(total(values) / count)
        log_sum = jax.nn.logsumexp(jnp.where(others, values, -jnp.inf), axis=-1)
        return Sums(log_sum, total(values - mean[..., None]) + count * mean, own, target)


def score_stats(log_score: jax.Array, x: jax.Array, x0: jax.Array) -> ScoreStats:
    """The statistics of any log score, normalised or not. Float[... V or S], Int[...], Int[...] -> Float[...].

    A mask column is excluded where x is the mask; elsewhere the absorbing process does not use the statistics.
    """
    sums = ArrayColumns(log_score).sums(x, x0)
    return ScoreStats(sums.log_sum, sums.total, jnp.where(x == x0, 0.0, sums.target))


def clean_stats(process, log_clean: jax.Array, x: jax.Array, x0: jax.Array, sigma: jax.Array) -> ScoreStats:
    """The statistics of the score that log r implies. Float[... V], Int[...], Int[...], Float[...] -> Float[...]."""
    return process.stats_of_clean(ArrayColumns(log_clean), x, x0, sigma)


def stats_from(process, denoiser: Denoiser) -> StatsFn:
    """The StatsFn of a Denoiser. It computes all B L V scores."""
    return lambda x, sigma, x0: clean_stats(process, denoiser(x, sigma, None), x, x0, sigma[:, None])


def posterior_from(process, denoiser: Denoiser) -> PosteriorFn:
    """The PosteriorFn of a Denoiser. It computes the distributions of all B L tokens."""

    def posterior(x, sigma, x0):
        log_posterior = process.log_posterior(denoiser(x, sigma, None), x, sigma[:, None])
        return jnp.take_along_axis(log_posterior, x0[..., None], axis=-1)[..., 0]

    return posterior
