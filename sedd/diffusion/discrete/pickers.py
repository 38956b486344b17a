"""Pickers: which masked positions an adaptive sampler unmasks next, from the Denoiser's distributions.

A picker depends on the unmasked tokens only, never on those about to be drawn: positions are chosen, then tokens drawn.
"""

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

# (log_clean: Float[B L V], masked: Bool[B L]) -> Bool[B L]: True at the masked positions to unmask next, at least one
# in each row that has any. log_clean at other positions is unspecified. Hashable.
Picker = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class MostCertain(abc.ABC):
    """Picks the `count` most certain masked positions of each row, or all if there are fewer."""

    count: int = 1

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"{type(self).__name__}: count must be at least 1, not {self.count}")

    @abc.abstractmethod
    def uncertainty(self, log_clean: jax.Array) -> jax.Array:
        """The uncertainty of each position, smaller is more certain. Float[B L V] -> Float[B L]."""

    def __call__(self, log_clean: jax.Array, masked: jax.Array) -> jax.Array:
        return masked & (_ranks(self.uncertainty(log_clean), masked) < self.count)


@dataclasses.dataclass(frozen=True)
class Margin(MostCertain):
    """By the difference of the two largest probabilities (Kim et al., arXiv 2502.06768)."""

    def uncertainty(self, log_clean):
        # Two maxima: a sort for the two largest of 50 000 takes ten times as long.
        largest = jax.nn.one_hot(jnp.argmax(log_clean, axis=-1), log_clean.shape[-1], dtype=bool)
        others = jnp.where(largest, -jnp.inf, log_clean)
        return jnp.exp(jnp.max(others, axis=-1)) - jnp.exp(jnp.max(log_clean, axis=-1))


@dataclasses.dataclass(frozen=True)
class Entropy(MostCertain):
    """By the entropy."""

    def uncertainty(self, log_clean):
        return -jnp.sum(jnp.where(log_clean > -jnp.inf, jnp.exp(log_clean) * log_clean, 0.0), axis=-1)


@dataclasses.dataclass(frozen=True)
class EntropyBounded:
    """Picks as many of the most certain positions as keep the error of drawing them independently bounded.

    In order of increasing entropy, it picks the longest prefix whose sum of entropies minus the largest one is at most
    `gamma` nats, and at least `count` positions, so that n masks take at most ceil(n / count) calls. At gamma 0 it
    picks nearly one position a call, at infinity all of them. Ben-Hamu et al., arXiv 2505.24857, with the entropy as
    the error proxy.
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


@dataclasses.dataclass(frozen=True)
class FirstBlock:
    """Picks as `picker` does, in the first block of `size` positions that has a masked position."""

    picker: Picker
    size: int

    def __call__(self, log_clean: jax.Array, masked: jax.Array) -> jax.Array:
        block = jnp.arange(masked.shape[-1])[None] // self.size
        return self.picker(log_clean, masked & (block == jnp.argmax(masked, axis=-1)[:, None] // self.size))


def _ranks(uncertainty: jax.Array, masked: jax.Array) -> jax.Array:
    """Ranks the masked positions, ties by position, before all others. Float[B L], Bool[B L] -> Int[B L]."""
    order = jnp.lexsort((uncertainty, ~masked), axis=-1)
    return jnp.argsort(order, axis=-1)
