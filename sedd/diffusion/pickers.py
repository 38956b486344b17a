"""Pickers: which of the masked positions an adaptive sampler reveals next, from what is believed of them.

A picker sees what has been revealed and never what is about to be drawn: a position is chosen, then its token is drawn.
"""

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

# (log_clean: Float[B L V], masked: Bool[B L]) -> Bool[B L]: which masked positions are revealed next, in each row at
# least one if there is one. What is believed of positions that are not masked is of no account. Hashable.
Picker = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class MostCertain(abc.ABC):
    """Picks the `count` masked positions of each row that are the most certain, all if there are fewer."""

    count: int = 1

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"{type(self).__name__}: count must be at least 1, not {self.count}")

    @abc.abstractmethod
    def uncertainty(self, log_clean: jax.Array) -> jax.Array:
        """Small where the Denoiser is certain. Float[B L V] -> Float[B L]."""

    def __call__(self, log_clean: jax.Array, masked: jax.Array) -> jax.Array:
        return masked & (_ranks(self.uncertainty(log_clean), masked) < self.count)


@dataclasses.dataclass(frozen=True)
class Margin(MostCertain):
    """Certain is a position whose two largest probabilities differ much (Kim et al., arXiv 2502.06768)."""

    def uncertainty(self, log_clean):
        # Two maxima: a sort for the two largest of 50 000 takes ten times as long.
        largest = jax.nn.one_hot(jnp.argmax(log_clean, axis=-1), log_clean.shape[-1], dtype=bool)
        others = jnp.where(largest, -jnp.inf, log_clean)
        return jnp.exp(jnp.max(others, axis=-1)) - jnp.exp(jnp.max(log_clean, axis=-1))


@dataclasses.dataclass(frozen=True)
class Entropy(MostCertain):
    """Certain is a position whose entropy is small."""

    def uncertainty(self, log_clean):
        return -jnp.sum(jnp.where(log_clean > -jnp.inf, jnp.exp(log_clean) * log_clean, 0.0), axis=-1)


@dataclasses.dataclass(frozen=True)
class EntropyBounded:
    """Picks as many of the most certain positions as bounds what drawing them as if independent can lose.

    In order of their entropy, the most whose sum of entropies less the largest is at most `gamma` nats, and never fewer
    than `count`, so that a row of n is done within ceil(n / count) calls. At gamma 0 nearly one position a call, at
    infinity all in one. Ben-Hamu et al., arXiv 2505.24857, with the entropy as what tells the error.
    """

    gamma: float
    count: int = 1

    def __post_init__(self):
        if not self.gamma >= 0:
            raise ValueError(f"EntropyBounded: gamma must be at least 0, not {self.gamma}")
        Entropy(self.count)

    def __call__(self, log_clean: jax.Array, masked: jax.Array) -> jax.Array:
        entropy = jnp.maximum(Entropy(self.count).uncertainty(log_clean), 0.0)
        ranks = _ranks(entropy, masked)
        entropy = jnp.sort(jnp.where(masked, entropy, jnp.inf), axis=-1)
        before = jnp.cumsum(jnp.pad(entropy[:, :-1], ((0, 0), (1, 0))), axis=-1)  # the sum without the largest
        return masked & ((ranks < self.count) | (jnp.take_along_axis(before, ranks, axis=-1) <= self.gamma))


def _ranks(uncertainty: jax.Array, masked: jax.Array) -> jax.Array:
    """Ranks masked positions, ties by position, and the others after them. Float[B L], Bool[B L] -> Int[B L]."""
    order = jnp.lexsort((uncertainty, ~masked), axis=-1)
    return jnp.argsort(order, axis=-1)
