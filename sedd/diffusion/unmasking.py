"""Samplers that reveal masks in an order of their own (absorbing process). None changes a token twice.

`Reveal` draws beforehand which call uncovers which position: each free position draws one uniform number, by its own
key, and from it a bucket; calls are the buckets of a row, in order, without the empty ones. So every row goes its own
way, no call is wasted, and the network is asked only where a token is drawn.

`Adaptive` asks everywhere and lets a picker (`sedd.diffusion.pickers`) say which of the masked positions come next. So
the order of a sequence is a function of the sequence, and the sampler has an exact likelihood.

All tell the Denoiser the noise of the row's own masked share, not that of the time of the plan: on two small trained
networks (by counts, by times; 32 tokens) that cost .001 to .005 nats a token less with 1 to 16 positions free, and no
more with all free (benchmarks/noise_conditioning.py). A mask may be given: it stays, and is in no call.
"""

import abc
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd.diffusion import keyed_random
from sedd.diffusion.pickers import Picker
from sedd.diffusion.process import Absorbing, Jump
from sedd.diffusion.samplers import Sampler, Tweedie, move, unmask
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
class PlannedUnmasking(Sampler):
    """Uncovers each free position in a call that is settled beforehand, all of a call as if independent.

    Needs the absorbing process. A call asks the Denoiser at W positions of a row, the most that one call can uncover.
    """

    def __post_init__(self):
        _needs_masks(self)

    @abc.abstractmethod
    def bucket(self, keys: jax.Array, free: jax.Array) -> jax.Array:
        """Which call uncovers each free position, up to empty ones: smaller is earlier. Key[B], Bool[B L] -> Int[B L].

        From one draw a position, with its own key.
        """

    @abc.abstractmethod
    def max_calls_and_width(self, length: int) -> tuple[int, int]:
        """The most calls that a row can take, and the most positions of a row that a call can uncover."""

    def plan(self, keys, free):
        return _calls(self.bucket(keys, free), free, *self.max_calls_and_width(free.shape[-1]))

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x), entry.positions)
        return move(keys, x, Jump(entry.chosen.astype(log_clean.dtype), log_clean), entry.positions)


def _calls(bucket: jax.Array, free: jax.Array, calls: int, width: int) -> Call:
    """The buckets of each row, of at most `width` positions, as calls; the empty ones are left out."""
    rows, length = jnp.arange(len(free))[:, None], free.shape[-1]
    order = jnp.lexsort((bucket, ~free), axis=-1)  # the free positions by bucket, then the others
    bucket = jnp.where(free, bucket, 0)[rows, order]
    number = jnp.cumsum(jnp.pad(bucket[:, 1:] != bucket[:, :-1], ((0, 0), (1, 0))), axis=-1)
    number = jnp.where(free[rows, order], number, calls)  # of the call; what is given has none
    if width == length:
        number = jnp.zeros_like(number).at[rows, order].set(number)
        return Call(None, number[None] == jnp.arange(calls)[:, None, None])
    size = jnp.zeros((len(free), calls), int).at[rows, number].add(1, mode="drop")
    end = jnp.cumsum(size, axis=-1).T[..., None]
    start = end - size.T[..., None]
    # Near the end a call looks at earlier ones again.
    slots = jnp.minimum(start, length - width) + jnp.arange(width)[None, None]
    return Call(order[rows, slots].astype(jnp.int32), (slots >= start) & (slots < end))


@dataclasses.dataclass(frozen=True)
class FirstHitting(PlannedUnmasking):
    """One position a call, in a uniformly random order: the reverse process itself, at the times at which it moves.

    Needs the absorbing process. Exact: it draws the law of decoding in random order, whatever the Denoiser, without any
    error in time, and with an exact Denoiser Bayes' conditional on the given tokens. As many calls as a row has free
    positions, the head at one of them. Zheng et al., arXiv 2409.02908: they draw the next time given the last; the
    order of one uniform time a position is the same law.
    """

    def bucket(self, keys, free):
        return keyed_random.ranks(keys, free)

    def max_calls_and_width(self, length):
        return length, 1


@dataclasses.dataclass(frozen=True)
class Counts(PlannedUnmasking):
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
        Tweedie(self.process, self.schedule, self.steps)  # has the check of the steps

    @property
    def tweedie(self) -> Tweedie:
        """The sampler whose law it has."""
        return Tweedie(self.process, self.schedule, self.steps)

    def masked(self) -> np.ndarray:
        """The chance that a position is still masked at each end of an interval: (1 - alpha_k) / (1 - alpha_0).

        Float64[steps + 1], from 1 to 0, to relative accuracy; static under jit.
        """
        with jax.ensure_compile_time_eval():
            sigma = np.asarray(self.tweedie.plan(None, None).sigma, np.float64)
        corrupted = -np.expm1(-sigma)
        return np.append(corrupted, 0.0) / corrupted[0]

    def bucket(self, keys, free):
        level = keyed_random.uniform(keyed_random.sites(keys, jnp.arange(free.shape[-1])))
        return self.steps - 1 - jnp.searchsorted(jnp.asarray(self.masked()[-2:0:-1]), level, side="right")

    def max_calls_and_width(self, length):
        return min(self.steps, length), length

    def step(self, keys, denoiser, x, entry):
        # A multinomial has no bound, so the head is asked of as many as nearly always suffice.
        return unmask(
            keys,
            denoiser,
            x,
            self.process.sigma_from_mask_ratio(x),
            entry.chosen,
            self.max_unmasked_per_step(x.shape[-1]),
        )

    def max_unmasked_per_step(self, length: int) -> int:
        """How many positions of a row a call asks for at once."""
        return self.tweedie.max_unmasked_per_step(length)


@dataclasses.dataclass(frozen=True)
class FixedCounts(PlannedUnmasking):
    """Uncovers a fixed share of each row's free positions in each call, those drawn uniformly at random.

    Needs the absorbing process. weights: one a call, in any unit; equal ones, `cosine_unmasking`, or those
    that `plan_unmasking` finds best for a model, with their error: with an exact Denoiser the divergence from its
    distribution is at most what is lost by drawing a call's tokens as if independent, of first order in 1 / calls. A
    row with n free positions has had round(n times the sum of the weights so far) uncovered after each call, and skips
    calls that uncover none. Hoogeboom et al., arXiv 2110.02037; Chang et al., arXiv 2202.04200.
    """

    weights: tuple[float, ...]

    def __post_init__(self):
        super().__post_init__()
        total = math.fsum(self.weights)
        if not all(weight >= 0 for weight in self.weights) or not 0 < total < math.inf:
            raise ValueError("FixedCounts: weights must be finite numbers, none below 0 and not all 0")

    def num_unmasked(self, count: jax.Array) -> jax.Array:
        """How many of `count` free positions are uncovered after each call but the last. Int[...] -> Int[... K - 1]."""
        share = np.cumsum(self.weights)[:-1] / np.sum(self.weights)
        product = count.astype(jnp.float32)[..., None] * share.astype(np.float32).reshape(*[1] * count.ndim, -1)
        return jnp.round(product).astype(jnp.int32)

    def bucket(self, keys, free):
        after = self.num_unmasked(jnp.sum(free, axis=-1))
        return jax.vmap(functools.partial(jnp.searchsorted, side="right"))(after, keyed_random.ranks(keys, free))

    def max_calls_and_width(self, length):
        counts = np.arange(1, length + 1)
        with jax.ensure_compile_time_eval():  # the very numbers of `bucket`, for every row that there can be
            after = np.asarray(self.num_unmasked(jnp.asarray(counts)))
        sizes = np.diff(after, prepend=0, append=counts[:, None])
        return int(np.max(np.sum(sizes > 0, axis=-1))), int(np.max(sizes))


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
        log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x), None)
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
            x = self.process.mask_tokens(x0, hidden)
            log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x, lengths), None)
            chosen = self.choose(log_clean, x, hidden)
            log_r = jnp.take_along_axis(log_clean, tokens, axis=-1)[..., 0]
            return hidden & ~chosen, total + jnp.sum(jnp.where(chosen, log_r, 0.0), axis=-1)

        start = free, jnp.zeros(x0.shape[0])
        return jax.lax.while_loop(lambda state: jnp.any(state[0]), reveal, start)[1]
