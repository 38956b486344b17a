"""Samplers that reveal masks in an order of their own (absorbing process). None changes a token twice.

`Reveal` draws beforehand which call uncovers which position: each free position draws one uniform number, by its own
key, and from it a bucket; calls are the buckets of a row, in order, without the empty ones. So every row goes its own
way, no call is wasted, and the network is asked only where a token is drawn.

`Adaptive` asks everywhere and lets a picker say which of the masked positions come next, from what is believed of
them. A picker sees what has been revealed and never what is about to be drawn: a position is chosen, then its token is
drawn. So the order of a sequence is a function of the sequence, and the sampler has an exact likelihood.

All tell the Denoiser the noise of the row's own masked share. A mask may be given: it stays, and is in no call.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.diffusion import draws
from sedd.diffusion.process import Absorbing, Jump
from sedd.diffusion.samplers import Sampler, Tweedie, move
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import Denoiser


def _needs_masks(sampler: Sampler):
    if not isinstance(sampler.process, Absorbing):
        name = type(sampler).__name__
        raise ValueError(f"{name} reveals masks: it needs the absorbing process, not {sampler.process}")


class Call(NamedTuple):
    """What one call uncovers in each row; with an axis of calls in front in the plan."""

    positions: jax.Array | None  # Int32[B W], where the Denoiser is asked, no two of a row the same; None for all L
    chosen: jax.Array  # Bool[B W], which of these are uncovered


@dataclasses.dataclass(frozen=True)
class Reveal(Sampler):
    """Uncovers each free position in a call that is settled beforehand, all of a call as if independent.

    Needs the absorbing process. A call asks the Denoiser at W positions of a row, the most that one call can uncover.
    """

    def __post_init__(self):
        _needs_masks(self)

    def bucket(self, keys: jax.Array, free: jax.Array) -> jax.Array:
        """Which call uncovers each free position, up to empty ones: smaller is earlier. Key[B], Bool[B L] -> Int[B L].

        From one draw a position, with its own key.
        """
        raise NotImplementedError

    def most(self, length: int) -> tuple[int, int]:
        """The most calls that a row can take, and the most positions of a row that a call can uncover."""
        raise NotImplementedError

    def plan(self, keys, free):
        return _calls(self.bucket(keys, free), free, *self.most(free.shape[-1]))

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, self.process.sigma_seen(x), entry.positions)
        return move(keys, x, Jump(entry.chosen.astype(log_clean.dtype), log_clean), entry.positions)


def _calls(bucket: jax.Array, free: jax.Array, calls: int, width: int) -> Call:
    """The buckets of each row as calls, the empty ones left out; of a larger one the first `width` positions."""
    rows, length = jnp.arange(len(free))[:, None], free.shape[-1]
    order = jnp.lexsort((bucket, ~free), axis=-1)  # the free positions by bucket, then the others
    bucket = jnp.where(free, bucket, 0)[rows, order]
    number = jnp.cumsum(jnp.pad(bucket[:, 1:] != bucket[:, :-1], ((0, 0), (1, 0))), axis=-1)
    number = jnp.where(free[rows, order], number, calls)  # of the call; what is given has none
    if width == length:
        number = jnp.zeros_like(number).at[rows, order].set(number)
        return Call(None, number == jnp.arange(calls)[:, None, None])
    size = jnp.zeros((len(free), calls), int).at[rows, number].add(1, mode="drop")
    end = jnp.cumsum(size, axis=-1).T[..., None]
    start = end - size.T[..., None]
    slots = jnp.minimum(start, length - width) + jnp.arange(width)  # near the end a call looks at earlier ones again
    return Call(order[rows, slots].astype(jnp.int32), (slots >= start) & (slots < end))


@dataclasses.dataclass(frozen=True)
class FirstHitting(Reveal):
    """One position a call, in a uniformly random order: the reverse process itself, at the times at which it moves.

    Needs the absorbing process. Exact: it draws the law of decoding in random order, whatever the Denoiser, without any
    error in time, and with an exact Denoiser Bayes' conditional on the given tokens. As many calls as a row has free
    positions, the head at one of them. Zheng et al., arXiv 2409.02908: they draw the next time given the last; the
    order of one uniform time a position is the same law.
    """

    def bucket(self, keys, free):
        return draws.ranks(keys, free)

    def most(self, length):
        return length, 1


@dataclasses.dataclass(frozen=True)
class Counts(Reveal):
    """Tweedie's law in `steps` steps, without the calls that change nothing.

    Needs the absorbing process. Each free position draws the interval of Tweedie's grid in which it is uncovered, so
    that how many an interval uncovers is multinomial, and only intervals that uncover something are calls: at most the
    smaller of `steps` and the row's free positions. The law, and so the error, is that of `Tweedie` for a Denoiser that
    does not look at the noise, or is told the row's own in both: of first order in 1 / steps. The calls are those that
    a cache leaves to ancestral sampling (Ou et al., arXiv 2406.03736), here in every row of a batch.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self):
        super().__post_init__()
        self._tweedie()

    def _tweedie(self) -> Tweedie:
        return Tweedie(self.process, self.schedule, self.steps)

    def masked(self) -> np.ndarray:
        """The chance that a position is still masked at each end of an interval: (1 - alpha_k) / (1 - alpha_0).

        Float64[steps + 1], from 1 to 0, to relative accuracy; static under jit.
        """
        with jax.ensure_compile_time_eval():
            sigma = np.asarray(self._tweedie().plan(None, None).sigma, np.float64)
        touched = -np.expm1(-sigma)
        return np.append(touched, 0.0) / touched[0]

    def bucket(self, keys, free):
        level = draws.uniform(draws.sites(keys, jnp.arange(free.shape[-1])))
        return self.steps - 1 - jnp.searchsorted(jnp.asarray(self.masked()[-2:0:-1]), level, side="right")

    def most(self, length):
        return min(self.steps, length), length

    def width(self, length: int) -> int:
        """How many positions of a row are asked about unless a call uncovers more: rarely exceeded, static."""
        chance = -np.diff(self.masked()).min()
        mean = length * chance
        return min(length, 1 + math.ceil(mean + 5 * math.sqrt(mean * (1 - chance))))

    def plan(self, keys, free):
        bucket, length = self.bucket(keys, free), free.shape[-1]
        calls, width = self.most(length)[0], self.width(length)
        everywhere = _calls(bucket, free, calls, length)
        return (None if width == length else _calls(bucket, free, calls, width)), everywhere

    def step(self, keys, denoiser, x, entry):
        few, everywhere = entry
        if few is None:
            return super().step(keys, denoiser, x, everywhere)
        # A multinomial has no bound: where a row uncovers more than `width`, the batch is asked everywhere.
        fits = jnp.sum(few.chosen) == jnp.sum(everywhere.chosen)
        step = super().step
        return jax.lax.cond(fits, lambda: step(keys, denoiser, x, few), lambda: step(keys, denoiser, x, everywhere))


@dataclasses.dataclass(frozen=True)
class FixedCounts(Reveal):
    """Uncovers a fixed share of each row's free positions in each call, those drawn uniformly at random.

    Needs the absorbing process. weights: one a call, in any unit; equal ones, `counts.cosine`, or those that
    `counts.reveal_counts` finds the best for a model, which also tells the error: with an exact Denoiser the divergence
    from its law is at most what is lost by drawing a call's tokens as if independent, of first order in 1 / calls. A
    row with n free positions has had round(n times the sum of the weights so far) uncovered after each call, and skips
    calls that uncover none. Hoogeboom et al., arXiv 2110.02037; Chang et al., arXiv 2202.04200.
    """

    weights: tuple[float, ...]

    def __post_init__(self):
        super().__post_init__()
        total = math.fsum(self.weights)
        if not all(weight >= 0 for weight in self.weights) or not 0 < total < math.inf:
            raise ValueError("FixedCounts: weights must be finite numbers, none below 0 and not all 0")

    def uncovered(self, count: jax.Array) -> jax.Array:
        """How many of `count` free positions are uncovered after each call but the last. Int[...] -> Int[... K - 1]."""
        share = np.cumsum(self.weights)[:-1] / np.sum(self.weights)
        product = count.astype(jnp.float32)[..., None] * share.astype(np.float32)
        return jnp.round(product).astype(jnp.int32)

    def bucket(self, keys, free):
        after = self.uncovered(jnp.sum(free, axis=-1))
        return jax.vmap(functools.partial(jnp.searchsorted, side="right"))(after, draws.ranks(keys, free))

    def most(self, length):
        counts = np.arange(1, length + 1)
        with jax.ensure_compile_time_eval():  # the very numbers of `bucket`, for every row that there can be
            after = np.asarray(self.uncovered(jnp.asarray(counts)))
        sizes = np.diff(after, prepend=0, append=counts[:, None])
        return int(np.max(np.sum(sizes > 0, axis=-1))), int(np.max(sizes))


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
        _needs_masks(self)

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
