"""Noise schedules: the total noise sigma(t), increasing in the time t in [0, 1].

sigma is dimensionless; a token is clean (not corrupted) at time t with probability alpha = exp(-sigma(t)).
All methods are pointwise and compute in the dtype of their argument.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp


def log_snr(sigma: jax.Array) -> jax.Array:
    """The log of the signal-to-noise ratio, log(alpha / (1 - alpha)) = -log(e^sigma - 1), without overflow."""
    return -(sigma + jnp.log(-jnp.expm1(-sigma)))


class Schedule(abc.ABC):
    """An increasing sigma(t), its derivative and its inverse."""

    @abc.abstractmethod
    def sigma(self, t: jax.Array | float) -> jax.Array:
        """The total noise at time t."""

    @abc.abstractmethod
    def rate(self, t: jax.Array) -> jax.Array:
        """d sigma / dt at time t."""

    @abc.abstractmethod
    def time(self, sigma: jax.Array) -> jax.Array:
        """The time at which the total noise is sigma."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """The probability that a token is clean at time t."""
        return jnp.exp(-self.sigma(t))


@dataclasses.dataclass(frozen=True)
class LogLinear(Schedule):
    """sigma(t) = -log(1 - (1 - eps) t): the corruption probability grows linearly, to 1 - eps (SEDD, section 5.1)."""

    eps: float = 1e-3

    def __post_init__(self):
        if not 0 < self.eps < 1:
            raise ValueError(f"LogLinear: eps must lie in (0, 1), not {self.eps}")

    def sigma(self, t):
        return -jnp.log1p(-(1 - self.eps) * t)

    def rate(self, t):
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def time(self, sigma):
        return -jnp.expm1(-sigma) / (1 - self.eps)


@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """sigma(t) = sigma_min^(1-t) sigma_max^t: the noise grows by a constant factor (SEDD, section 5.1)."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"Geometric: needs 0 < sigma_min < sigma_max, not {self.sigma_min}, {self.sigma_max}")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t):
        return self.sigma_min * jnp.exp(self._log_ratio * t)

    def rate(self, t):
        return self._log_ratio * self.sigma(t)

    def time(self, sigma):
        return jnp.log(sigma / self.sigma_min) / self._log_ratio
