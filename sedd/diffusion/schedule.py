"""Noise schedules: the total noise sigma(t), increasing in the time t in [0, 1].

sigma is dimensionless. alpha = exp(-sigma(t)) is the probability that a token is clean (not corrupted) at time t, and
for Gaussian noise the share of the variance that is signal, the papers' alpha-bar; there rate(t) is their beta(t).
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


@dataclasses.dataclass(frozen=True)
class Power(Schedule):
    """(1 - alpha)^power grows linearly with t, and 1 - alpha from low to high.

    At uniform times the density of u = 1 - alpha is proportional to u^(power - 1): a higher power gives more times of
    high noise.
    """

    low: float = 0.01
    high: float = 1 - 1e-4
    power: float = 3.0

    def __post_init__(self):
        if not (0 < self.low < self.high < 1 and self.power > 0):
            raise ValueError(
                f"{type(self).__name__}: needs 0 < low < high < 1 and power > 0, not {self.low}, {self.high}, "
                f"{self.power}"
            )

    @property
    def _span(self) -> float:
        return self.high**self.power - self.low**self.power

    def _noise(self, t):
        """1 - alpha."""
        return (self.low**self.power + self._span * t) ** (1 / self.power)

    def sigma(self, t):
        return -jnp.log1p(-self._noise(t))

    def rate(self, t):
        noise = self._noise(t)
        return self._span / (self.power * noise ** (self.power - 1) * (1 - noise))

    def time(self, sigma):
        return ((-jnp.expm1(-sigma)) ** self.power - self.low**self.power) / self._span


@dataclasses.dataclass(frozen=True)
class Sqrt(Power):
    """1 - alpha = sqrt(low^2 + (high^2 - low^2) t) (Diffusion-LM, arXiv 2205.14217, appendix A)."""

    power: float = 2.0


@dataclasses.dataclass(frozen=True)
class Tan(Schedule):
    """sigma(t) = log(1 + d^2 tan^2 theta), theta = pi/2 (start + (1 - start - end) t) (TEncDM, arXiv 2402.19097).

    Its log signal-to-noise ratio is that of d = 1, the cosine schedule, less 2 log d. start and end keep both ends
    finite.
    """

    d: float = 9.0
    start: float = 1e-3
    end: float = 1e-3

    def __post_init__(self):
        if not (self.d > 0 and self.start > 0 and self.end > 0 and self.start + self.end < 1):
            raise ValueError(
                f"Tan: needs d > 0, start > 0, end > 0 and start + end < 1, not {self.d}, {self.start}, {self.end}"
            )

    @property
    def _span(self) -> float:
        return math.pi / 2 * (1 - self.start - self.end)

    def _angle(self, t):
        return math.pi / 2 * self.start + self._span * t

    def sigma(self, t):
        return jnp.log1p((self.d * jnp.tan(self._angle(t))) ** 2)

    def rate(self, t):
        tan = jnp.tan(self._angle(t))
        return 2 * self._span * self.d**2 * tan * (1 + tan**2) / (1 + (self.d * tan) ** 2)

    def time(self, sigma):
        return (jnp.arctan(jnp.sqrt(jnp.expm1(sigma)) / self.d) - math.pi / 2 * self.start) / self._span


def Cosine(start: float = 1e-3, end: float = 1e-3) -> Tan:
    """alpha = cos^2 theta (Nichol and Dhariwal, arXiv 2102.09672): `Tan` with d = 1."""
    return Tan(1.0, start, end)


@dataclasses.dataclass(frozen=True)
class LinearBeta(Schedule):
    """sigma(t) = low t + (high - low) t^2 / 2: the rate grows linearly (Song et al., arXiv 2011.13456, VP SDE)."""

    low: float = 0.1
    high: float = 20.0

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise ValueError(f"LinearBeta: needs 0 < low < high, not {self.low}, {self.high}")

    def sigma(self, t):
        return t * (self.low + (self.high - self.low) * t / 2)

    def rate(self, t):
        return self.low + (self.high - self.low) * t

    def time(self, sigma):
        return 2 * sigma / (self.low + jnp.sqrt(self.low**2 + 2 * (self.high - self.low) * sigma))


@dataclasses.dataclass(frozen=True)
class LogSNR(Schedule):
    """The log signal-to-noise ratio falls linearly, from that of sigma_min to that of sigma_max."""

    sigma_min: float = 0.01
    sigma_max: float = 9.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"LogSNR: needs 0 < sigma_min < sigma_max, not {self.sigma_min}, {self.sigma_max}")

    @classmethod
    def between(cls, low: float, high: float) -> "LogSNR":
        """The schedule on which 1 - alpha runs from low to high. ValueError unless 0 < low < high < 1."""
        if not 0 < low < high < 1:
            raise ValueError(f"LogSNR: needs 0 < low < high < 1, not {low}, {high}")
        return cls(-math.log1p(-low), -math.log1p(-high))

    @property
    def _ends(self) -> tuple[float, float]:
        """log (e^sigma - 1), the negative log ratio, at both ends."""
        low, high = (sigma + math.log(-math.expm1(-sigma)) for sigma in (self.sigma_min, self.sigma_max))
        return low, high

    def _noise_ratio(self, t):
        low, high = self._ends
        return low + (high - low) * t

    def sigma(self, t):
        return jax.nn.softplus(self._noise_ratio(t))

    def rate(self, t):
        low, high = self._ends
        return (high - low) * jax.nn.sigmoid(self._noise_ratio(t))

    def time(self, sigma):
        low, high = self._ends
        return (-log_snr(sigma) - low) / (high - low)
