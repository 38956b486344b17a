"""Samplers that reveal masks in an order of their own (absorbing process).

A picker says which of the masked positions come next, from what is believed of them. It sees what has been revealed
and never what is about to be drawn: a position is chosen, then its token is drawn. So the order of a sequence is a
function of the sequence, and the sampler has an exact likelihood.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sedd.diffusion.process import Absorbing, Jump
from sedd.diffusion.samplers import Sampler, move
from sedd.diffusion.score import Denoiser

# (log_clean: Float[B L V], masked: Bool[B L]) -> Bool[B L]: which masked positions are revealed next, in each row at
# least one if there is one. What is believed of positions that are not masked is of no account. Hashable.
Picker = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class MostCertain:
    """Picks the `count` masked positions of each row that are the most certain, all if there are fewer."""

    count: int = 1

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"{type(self).__name__}: count must be at least 1, not {self.count}")

    def uncertainty(self, log_clean: jax.Array) -> jax.Array:
        """Small where the Denoiser is certain. Float[B L V] -> Float[B L]."""
        raise NotImplementedError

    def __call__(self, log_clean: jax.Array, masked: jax.Array) -> jax.Array:
        return masked & (_ranks(self.uncertainty(log_clean), masked) < self.count)


@dataclasses.dataclass(frozen=True)
class Margin(MostCertain):
    """Certain is a position whose two largest probabilities differ much (Kim et al., arXiv 2502.06768)."""

    def uncertainty(self, log_clean):
        # Two maxima: a sort for the two largest of 50 000 takes ten times as long.
        largest = jnp.argmax(log_clean, axis=-1, keepdims=True)
        others = jnp.where(jnp.arange(log_clean.shape[-1]) == largest, -jnp.inf, log_clean)
        return jnp.exp(jnp.max(others, axis=-1)) - jnp.exp(jnp.max(log_clean, axis=-1))


@dataclasses.dataclass(frozen=True)
class Entropy(MostCertain):
    """Certain is a position whose entropy is small."""

    def uncertainty(self, log_clean):
        return -jnp.sum(jnp.where(log_clean > -jnp.inf, jnp.exp(log_clean) * log_clean, 0.0), axis=-1)


def _ranks(uncertainty: jax.Array, masked: jax.Array) -> jax.Array:
    """Ranks masked positions, ties by position, and the others after them. Float[B L], Bool[B L] -> Int[B L]."""
    order = jnp.lexsort((uncertainty, ~masked), axis=-1)
    return jnp.argsort(order, axis=-1)


@dataclasses.dataclass(frozen=True)
class Adaptive(Sampler):
    """Decodes in an order chosen from what is already revealed, in each call all positions that the picker picks.

    Needs the absorbing process. The Denoiser is asked at every position, and told the noise of the row's own masked
    share. Tokens revealed in one call are drawn independently of each other.

    A learned Denoiser answers for no single law, so the law of this sampler is not that of decoding in random order,
    and a bound on the one is none on the other. `log_likelihood` is that of this sampler itself: exact, no bound. With
    an exact Denoiser and one position a call both laws are the Denoiser's own.
    """

    picker: Picker

    def __post_init__(self):
        if not isinstance(self.process, Absorbing):
            raise ValueError(f"Adaptive reveals masks: it needs the absorbing process, not {self.process}")

    def plan(self, keys, free):
        # At most L calls. Each is told what is free: a mask may be given, and then stays. With a byte for each pair of
        # positions that is little beside the answers, which have a number for each position and token.
        return jnp.broadcast_to(free, (free.shape[-1], *free.shape))

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, self.process.sigma_seen(x), None)
        chosen = self.choose(log_clean, x, entry)
        return move(keys, x, Jump(chosen.astype(log_clean.dtype), log_clean))

    def choose(self, log_clean: jax.Array, x: jax.Array, free: jax.Array) -> jax.Array:
        """What one call reveals, settled before it draws. Float[B L V], Int[B L], Bool[B L] -> Bool[B L]."""
        return self.picker(log_clean, self.process.movable(x) & free)

    def log_likelihood(
        self, denoiser: Denoiser, x0: jax.Array, free: jax.Array, lengths: jax.Array | None = None
    ) -> jax.Array:
        """The exact log-likelihood, in nats, of this sampler for the free tokens given the others. Float[B].

        What the sampler draws is here told: the same calls, the same choices (DUEL, arXiv 2603.01367). The loop ends
        when no row has a free token left. Pure; meant to be jitted.

        x0: Int[B L]; free: Bool[B L], False where x0 is seen as it stands: tokens, or masks that are never revealed;
        lengths: Int[B], the valid lengths if they are not L.
        """
        tokens = jnp.minimum(x0, self.process.vocab_size - 1)[..., None]

        def reveal(state):
            hidden, total = state
            x = self.process.hide(x0, hidden)
            log_clean = denoiser(x, self.process.sigma_seen(x, lengths), None)
            chosen = self.choose(log_clean, x, hidden)
            log_r = jnp.take_along_axis(log_clean, tokens, axis=-1)[..., 0]
            return hidden & ~chosen, total + jnp.sum(jnp.where(chosen, log_r, 0.0), axis=-1)

        start = free, jnp.zeros(x0.shape[0])
        return jax.lax.while_loop(lambda state: jnp.any(state[0]), reveal, start)[1]
