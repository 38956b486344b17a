"""Bounds on the negative log-likelihood as evaluation asks for them: what a bound is, and how its draws are made.

-log p(x0) <= prior + diffusion + reconstruction, each by the process that is reversed.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Clean


class BoundTerms(NamedTuple):
    """The three terms of the bound. Each Float[B], nats a row."""

    prior: jax.Array
    diffusion: jax.Array
    reconstruction: jax.Array


class Draws(NamedTuple):
    """M draws of the terms of each row's bound, in nats a row, stratified over the noise levels.

    Each half of the draws covers all noise levels with independent noise: the difference of the halves' means estimates
    the error of the overall mean. Statistics with a leading axis keep it here, before B.
    """

    level: jax.Array  # Float[M B], 1 - alpha, of tokens the corruption probability; by mask count, k / n unrounded
    width: jax.Array  # Float[M B], M times the interval of 1 - alpha that the draw represents; 1 where levels are even
    prior: jax.Array  # Float[M B], the same in all draws of a row
    diffusion: jax.Array  # Float[M ... B]
    reconstruction: jax.Array  # Float[M ... B]


@dataclasses.dataclass(frozen=True)
class Bound(abc.ABC):
    """A bound on the negative log-likelihood as evaluation asks for it: its draws, and what it bounds.

    Frozen and hashable, so that it can be a static argument of jit.
    """

    process: Any

    @property
    @abc.abstractmethod
    def likelihood_of(self) -> str:
        """The generative distribution whose likelihood is bounded, in words."""

    def takes_pairs(self, num_draws: int) -> bool:
        """True if `draws` calls the network with antithetic pairs of rows, so that a head can have a static size."""
        return False

    @abc.abstractmethod
    def draws(
        self,
        stats_fn: Callable[..., Any],
        keys: jax.Array,
        x0: Clean,
        num_draws: int,
        free: jax.Array | None = None,
        lengths: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> Draws:
        """Draws of the terms of each row, with M = `num_draws`.

        stats_fn: a StatsFn, of latents a LatentStatsFn; keys: Key[B]; x0: Int[B L], or latents Float[B L D]; free:
        Bool[B L], False where a token is given or unknown, and not scored; lengths: Int[B], the valid lengths if the
        network is conditioned on them; rows: Int[B], the rows' global indices.
        """

    @abc.abstractmethod
    def blank(self, num_rows: int, length: int) -> tuple[Callable[..., Any], Clean]:
        """A function of statistics that are 0, and clean rows of `length` positions: for `levels`."""

    def levels(self, keys: jax.Array, num_draws: int, rows: jax.Array, length: int = 1) -> tuple[jax.Array, jax.Array]:
        """Levels and widths of the draws, Float[M B] each. They are independent of text and network.

        length: of the rows; only those of blocks depend on it.
        """
        stats_fn, x0 = self.blank(len(rows), length)
        draws = self.draws(stats_fn, keys, x0, num_draws, rows=rows)
        return draws.level, draws.width

    def nats(self, draws: Draws) -> jax.Array:
        """The sum of the terms, nats a row. Float[M ... B]."""
        prior = jnp.reshape(draws.prior, (len(draws.prior), *[1] * (draws.diffusion.ndim - 2), -1))
        return prior + draws.diffusion + draws.reconstruction


def in_halves(at: Callable[..., Draws], keys: jax.Array, num_draws: int, draws_per_call: int) -> Draws:
    """Maps at(keys, stratum, strata) over the strata of both halves; of a single half if num_draws is odd."""
    halves = 2 if num_draws % 2 == 0 else 1
    strata = num_draws // halves

    def one(number):
        half, stratum = number // (strata // draws_per_call), number % (strata // draws_per_call)
        return at(keyed_random.fold(keyed_random.fold(keys, half), stratum), stratum, strata)

    draws = jax.lax.map(one, jnp.arange(num_draws // draws_per_call))
    return jax.tree.map(lambda leaf: leaf.reshape(num_draws, *leaf.shape[2:]), draws)


def in_stratum(stratum: jax.Array, strata: int, keys: jax.Array) -> jax.Array:
    """Uniform on a stratum of [0, 1), one number a key, in the default dtype. Int[] or Int[B], Key[B] -> Float[B]."""
    dtype = jnp.result_type(float)
    return (jnp.asarray(stratum, dtype) + keyed_random.uniform(keys, dtype)) / strata
