"""Samplers that unmask tokens in an order of their own (absorbing process). No token is changed twice.

`PlannedUnmasking` decides before the first step which call unmasks which position: each free position draws one random
number, with its own key, and from it a bucket; the calls of a row are its nonempty buckets, in order. So the order
differs by row, no call is wasted, and the network is evaluated only where a token is drawn.

`Blockwise` unmasks block after block, each as one of these unmasks a row.

`Adaptive` evaluates the network at all positions, and a picker (`sedd.diffusion.discrete.pickers`) chooses the masked
positions to unmask next. So the order of a sequence is a function of the sequence, and the sampler has an exact
likelihood.

All condition the Denoiser on the row's own mask ratio, not on the time of the plan: on two small trained networks (by
mask count, by time; 32 tokens) that cost .001 to .005 nats a token less with 1 to 16 positions free, and no more with
all free (benchmarks/noise_conditioning.py). A given token may be a mask: it stays, and belongs to no call.
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
from sedd.diffusion.denoiser import Denoiser
from sedd.diffusion.discrete.pickers import FirstBlock, Picker
from sedd.diffusion.discrete.process import Absorbing, Jump
from sedd.diffusion.discrete.samplers import TokenSampler, Tweedie, move, unmask
from sedd.diffusion.schedule import Schedule


def _check_absorbing(sampler: TokenSampler) -> None:
    if sampler.process.mask_id is None:
        name = type(sampler).__name__
        raise ValueError(f"{name} unmasks tokens: it needs the absorbing process, not {sampler.process}")


class Call(NamedTuple):
    """The positions that one call unmasks in each row; the plan has a leading axis of calls."""

    positions: jax.Array | None  # Int32[B W], where the Denoiser is evaluated, distinct in a row; None for all L
    chosen: jax.Array  # Bool[B W], True at those that are unmasked


@dataclasses.dataclass(frozen=True)
class PlannedUnmasking(TokenSampler):
    """Unmasks each free position in a call that is decided beforehand; the tokens of a call are drawn independently.

    Needs the absorbing process. A call evaluates the Denoiser at W positions of a row, the maximum that a call unmasks.
    """

    process: Absorbing

    def __post_init__(self):
        _check_absorbing(self)

    @abc.abstractmethod
    def bucket(self, keys: jax.Array, free: jax.Array) -> jax.Array:
        """The bucket in which each free position is unmasked, smaller is earlier. Key[B], Bool[B L] -> Int[B L].

        From one random number a position, with its own key. Buckets may be empty.
        """

    @abc.abstractmethod
    def plan_shape(self, length: int) -> tuple[int, int]:
        """The maximum number of calls of a row, and the maximum number of positions of a row that a call unmasks."""

    def in_blocks(self, size):
        return Blockwise(self.process, self, size)

    def plan(self, keys, free):
        return _calls(self.bucket(keys, free), free, *self.plan_shape(free.shape[-1]))

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x), entry.positions)
        return move(keys, x, Jump(entry.chosen.astype(log_clean.dtype), log_clean), entry.positions)


def _calls(bucket: jax.Array, free: jax.Array, calls: int, width: int) -> Call:
    """The nonempty buckets of each row, of at most `width` positions, as calls. Int[B L], Bool[B L] -> Call."""
    rows, length = jnp.arange(len(free))[:, None], free.shape[-1]
    order = jnp.lexsort((bucket, ~free), axis=-1)  # the free positions by bucket, then the given ones
    bucket = jnp.where(free, bucket, 0)[rows, order]
    number = jnp.cumsum(jnp.pad(bucket[:, 1:] != bucket[:, :-1], ((0, 0), (1, 0))), axis=-1)
    number = jnp.where(free[rows, order], number, calls)  # of the call; given positions have none
    if width == length:
        number = jnp.zeros_like(number).at[rows, order].set(number)
        return Call(None, number[None] == jnp.arange(calls)[:, None, None])
    size = jnp.zeros((len(free), calls), int).at[rows, number].add(1, mode="drop")
    end = jnp.cumsum(size, axis=-1).T[..., None]
    start = end - size.T[..., None]
    # Near the end of a row the window also covers positions of earlier calls, which are not chosen.
    slots = jnp.minimum(start, length - width) + jnp.arange(width)[None, None]
    return Call(order[rows, slots].astype(jnp.int32), (slots >= start) & (slots < end))


@dataclasses.dataclass(frozen=True)
class FirstHitting(PlannedUnmasking):
    """One position a call, in a uniformly random order: the reverse process itself, at the times of its jumps.

    Needs the absorbing process. Exact: it samples from the distribution of decoding in random order, for any Denoiser,
    without any discretisation error; with an exact Denoiser that is the conditional distribution given the tokens. A
    row takes as many calls as it has free positions, the head at one of them. Zheng et al., arXiv 2409.02908, draw the
    next time given the last; the order of one uniform time a position has the same distribution.
    """

    def bucket(self, keys, free):
        return keyed_random.ranks(keys, free)

    def plan_shape(self, length):
        return length, 1


@dataclasses.dataclass(frozen=True)
class Counts(PlannedUnmasking):
    """The distribution of Tweedie in `steps` steps, without the calls that change nothing.

    Needs the absorbing process. Each free position draws the interval of Tweedie's grid in which it is unmasked, so
    that the numbers unmasked in the intervals are multinomial; only intervals that unmask something are calls: at most
    the smaller of `steps` and the row's number of free positions. The distribution, and so the error, is that of
    `Tweedie` for a Denoiser that does not depend on the noise, or is conditioned on the row's mask ratio in both: of
    first order in 1 / steps. The calls are those that a cache leaves to ancestral sampling (Ou et al.,
    arXiv 2406.03736), here separately for every row of a batch.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self):
        super().__post_init__()
        Tweedie(self.process, self.schedule, self.steps)  # raises for invalid steps

    @property
    def tweedie(self) -> Tweedie:
        """The sampler with the same distribution."""
        return Tweedie(self.process, self.schedule, self.steps)

    def p_masked(self) -> np.ndarray:
        """The probability that a free position is masked at each point of the grid, (1 - alpha_k) / (1 - alpha_0).

        Float64[steps + 1], from 1 to 0, to full relative precision; static under jit.
        """
        with jax.ensure_compile_time_eval():
            sigma = np.asarray(self.tweedie.plan(None, None).sigma, np.float64)
        corrupted = -np.expm1(-sigma)
        return np.append(corrupted, 0.0) / corrupted[0]

    def bucket(self, keys, free):
        u = keyed_random.uniform(keyed_random.position_keys(keys, jnp.arange(free.shape[-1])))
        return self.steps - 1 - jnp.searchsorted(jnp.asarray(self.p_masked()[-2:0:-1]), u, side="right")

    def plan_shape(self, length):
        return min(self.steps, length), length

    def step(self, keys, denoiser, x, entry):
        # The multinomial numbers are unbounded, so the head has a width that nearly always suffices.
        sigma = self.process.sigma_from_mask_ratio(x)
        return unmask(keys, denoiser, x, sigma, entry.chosen, self.head_width(x.shape[-1]))

    def head_width(self, length: int) -> int:
        """Number of positions of a row at which one network call evaluates the head; static under jit."""
        return self.tweedie.head_width(length)


@dataclasses.dataclass(frozen=True)
class FixedCounts(PlannedUnmasking):
    """Unmasks a fixed fraction of each row's free positions in each call, drawn uniformly at random.

    Needs the absorbing process. weights: one a call, in any unit: equal ones, `cosine_unmasking`, or the optimal ones
    of `plan_unmasking` for a model. With an exact Denoiser the KL divergence from its distribution is at most the loss
    of drawing a call's tokens independently, which `plan_unmasking` predicts; it is of first order in 1 / calls. In a
    row with n free positions round(n times the sum of the weights so far) are unmasked after each call; calls that
    unmask none are skipped. Hoogeboom et al., arXiv 2110.02037; Chang et al., arXiv 2202.04200.
    """

    weights: tuple[float, ...]

    def __post_init__(self):
        super().__post_init__()
        total = math.fsum(self.weights)
        if not all(weight >= 0 for weight in self.weights) or not 0 < total < math.inf:
            raise ValueError("FixedCounts: weights must be finite numbers, none below 0 and not all 0")

    def num_unmasked(self, count: jax.Array) -> jax.Array:
        """Number unmasked, of `count` free positions, after each call but the last. Int[...] -> Int[... K - 1]."""
        fraction = np.cumsum(self.weights)[:-1] / np.sum(self.weights)
        product = count.astype(jnp.float32)[..., None] * fraction.astype(np.float32).reshape(*[1] * count.ndim, -1)
        return jnp.round(product).astype(jnp.int32)

    def bucket(self, keys, free):
        after = self.num_unmasked(jnp.sum(free, axis=-1))
        return jax.vmap(functools.partial(jnp.searchsorted, side="right"))(after, keyed_random.ranks(keys, free))

    def plan_shape(self, length):
        counts = np.arange(1, length + 1)
        with jax.ensure_compile_time_eval():  # exactly as in `bucket`, for every possible row
            after = np.asarray(self.num_unmasked(jnp.asarray(counts)))
        sizes = np.diff(after, prepend=0, append=counts[:, None])
        return int(np.max(np.sum(sizes > 0, axis=-1))), int(np.max(sizes))


@dataclasses.dataclass(frozen=True)
class Blockwise(PlannedUnmasking):
    """Unmasks block after block of `size` positions, from left to right, each as `sampler` unmasks a row.

    Needs the absorbing process. The order in which a network of blocks generates (Arriola et al., arXiv 2503.09573):
    with `FirstHitting` its distribution; with blocks of one position that of autoregressive decoding. The calls of
    `sampler`, such as the `steps` of `Counts`, are those of each block.
    """

    sampler: PlannedUnmasking
    size: int

    def __post_init__(self):
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"Blockwise: a block has at least one position, not {self.size}")

    def in_blocks(self, size):
        if size != self.size:
            raise ValueError(f"the sampler is for blocks of {self.size} tokens, the model for blocks of {size}")
        return self

    def bucket(self, keys, free):
        rows, length = free.shape
        count = -(-length // self.size)
        blocks = jnp.pad(free, ((0, 0), (0, -length % self.size))).reshape(rows * count, self.size)
        of_blocks = keyed_random.position_keys(keys, jnp.arange(count)).ravel()
        within = jnp.where(blocks, self.sampler.bucket(of_blocks, blocks), 0).reshape(rows, -1)[:, :length]
        return within + (1 + jnp.max(within)) * (jnp.arange(length) // self.size)[None]

    def plan_shape(self, length):
        calls, width = self.sampler.plan_shape(min(self.size, length))
        return calls * -(-length // self.size), width


@dataclasses.dataclass(frozen=True)
class Adaptive(TokenSampler):
    """Decodes in an order chosen from the unmasked tokens; each call unmasks all positions that the picker picks.

    Needs the absorbing process. Each call evaluates the Denoiser at every position, conditioned on the row's own mask
    ratio. The tokens of one call are drawn independently of each other.

    A learned Denoiser is in general not consistent with any single joint distribution, so the distribution of this
    sampler differs from that of decoding in random order, and a bound on one is not a bound on the other.
    `log_likelihood` is the exact log-likelihood of this sampler. With an exact Denoiser and one position a call both
    are the Denoiser's own distribution.
    """

    process: Absorbing
    picker: Picker

    def __post_init__(self):
        _check_absorbing(self)

    def in_blocks(self, size):
        if isinstance(self.picker, FirstBlock):
            return Adaptive(self.process, FirstBlock(self.picker.picker, size))
        return Adaptive(self.process, FirstBlock(self.picker, size))

    def plan(self, keys, free):
        # At most L calls. Each needs `free`, since given masks must stay. One byte for each pair of positions is small
        # beside the Denoiser's output, which has a number for each position and token.
        return jnp.broadcast_to(free, (free.shape[-1], *free.shape))

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x), None)
        chosen = self.choose(log_clean, x, entry)
        return move(keys, x, Jump(chosen.astype(log_clean.dtype), log_clean))

    def choose(self, log_clean: jax.Array, x: jax.Array, free: jax.Array) -> jax.Array:
        """True at the positions that one call unmasks. Float[B L V], Int[B L], Bool[B L] -> Bool[B L]."""
        return self.picker(log_clean, self.process.movable(x) & free)

    def log_likelihood(
        self, denoiser: Denoiser, x0: jax.Array, free: jax.Array, lengths: jax.Array | None = None
    ) -> jax.Array:
        """The exact log-likelihood, in nats, of the free tokens given the others under this sampler. Float[B].

        It repeats the calls and the choices of sampling, with the tokens of x0 in place of drawn ones (DUEL,
        arXiv 2603.01367). The loop ends when no row has a masked free token. Pure; meant to be jitted.

        x0: Int[B L]; free: Bool[B L], False where x0 is seen as it stands: tokens, or masks that stay masked;
        lengths: Int[B], the valid lengths if they are not L.
        """
        tokens = jnp.minimum(x0, self.process.vocab_size - 1)[..., None]

        def unmask_next(state):
            masked, total = state
            x = self.process.mask_tokens(x0, masked)
            log_clean = denoiser(x, self.process.sigma_from_mask_ratio(x, lengths), None)
            chosen = self.choose(log_clean, x, masked)
            log_r = jnp.take_along_axis(log_clean, tokens, axis=-1)[..., 0]
            return masked & ~chosen, total + jnp.sum(jnp.where(chosen, log_r, 0.0), axis=-1)

        start = free, jnp.zeros(x0.shape[0])
        return jax.lax.while_loop(lambda state: jnp.any(state[0]), unmask_next, start)[1]
