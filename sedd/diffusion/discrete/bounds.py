"""The bounds as evaluation asks for them: draws of their terms, the prior, and a description in words.

`sedd.diffusion.discrete.likelihood` has the draws themselves. `bound_of` chooses the bound of a process.
"""

import abc
import dataclasses
from typing import cast

import jax

from sedd.diffusion.discrete.likelihood import Draws, count_draws, level_draws, time_draws, uses_pairs
from sedd.diffusion.discrete.process import Absorbing, Process
from sedd.diffusion.discrete.score import StatsFn
from sedd.diffusion.schedule import Schedule

MIN_HIGH = 12.0  # least upper limit of sigma without a mask: there the prior is below 1e-5 nats a token


@dataclasses.dataclass(frozen=True)
class Bound(abc.ABC):
    """A bound on the negative log-likelihood, frozen and hashable, so that it can be a static argument of jit."""

    process: Process

    @property
    @abc.abstractmethod
    def likelihood_of(self) -> str:
        """The generative distribution whose likelihood is bounded, in words."""

    @property
    def prior(self) -> float:
        """The prior term, nats a token."""
        return 0.0

    def takes_pairs(self, num_draws: int) -> bool:
        """True if `draws` calls its StatsFn with antithetic pairs of rows, so that a head can have a static size."""
        return False

    @abc.abstractmethod
    def draws(
        self,
        stats_fn: StatsFn,
        keys: jax.Array,
        x0: jax.Array,
        num_draws: int,
        free: jax.Array | None = None,
        lengths: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> Draws:
        """Draws of the other terms of each row, with M = `num_draws`.

        keys: Key[B]; x0: Int[B L]; free: Bool[B L], False where a token is given or unknown, and not scored; lengths:
        Int[B], the valid lengths if the network is conditioned on them; rows: Int[B], the rows' global indices.
        """


@dataclasses.dataclass(frozen=True)
class MaskCountBound(Bound):
    """The bound by mask counts, for a process with a mask: over all noise levels, with prior and reconstruction 0."""

    likelihood_of = "decoding one token at a time in random order, conditioned on the number of masked tokens"

    def takes_pairs(self, num_draws):
        return uses_pairs(num_draws)

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        return count_draws(cast(Absorbing, self.process), stats_fn, keys, x0, num_draws, free, lengths)


@dataclasses.dataclass(frozen=True)
class NoiseLevelBound(Bound):
    """The bound by noise levels, from sigma `high` down to `low`."""

    low: float
    high: float

    @property
    def likelihood_of(self):
        return f"the reverse process from sigma {self.high:g} to {self.low:g}, and one step from there"

    @property
    def prior(self):
        return self.process.prior_divergence(self.high)

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        return level_draws(self.process, stats_fn, keys, x0, num_draws, self.low, self.high, free)


@dataclasses.dataclass(frozen=True)
class TimeLoss(Bound):
    """The loss at times in [eps, 1] as papers report it: not a bound, but close to one.

    strata: consecutive rows whose times are stratified over [eps, 1] together, a power of two.
    """

    schedule: Schedule
    eps: float
    strata: int

    likelihood_of = "not a bound: the loss that those papers report, without prior and reconstruction"

    def stratum(self, rows: jax.Array) -> jax.Array:
        """The stratum of each row, Int[B] -> Int[B]. Neighbours are far apart, so that a cluster spans the levels."""
        stride = round(self.strata * 0.618) | 1  # coprime to a power of two
        return rows * stride % self.strata

    def draws(self, stats_fn, keys, x0, num_draws, free=None, lengths=None, rows=None):
        assert rows is not None  # their strata depend on them
        stratum = self.stratum(rows)
        return time_draws(self.process, self.schedule, stats_fn, keys, x0, num_draws, self.eps, stratum, self.strata)


def bound_of(process: Process, schedule: Schedule) -> Bound:
    """Returns the bound of a process that is trained with a schedule: by mask counts if it has a mask."""
    if process.mask_id is not None:
        return MaskCountBound(process)
    return NoiseLevelBound(process, float(schedule.sigma(0.0)), max(float(schedule.sigma(1.0)), MIN_HIGH))
