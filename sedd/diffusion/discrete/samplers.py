"""Tau-leaping samplers of tokens, and the draws that samplers of tokens share.

Steps are factorised over the positions: a `Jump` for each token, drawn by `move`. Samplers of the absorbing process
that leave the grid of noise levels are in `sedd.diffusion.discrete.unmasking`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Denoiser
from sedd.diffusion.discrete.process import Jump, Process
from sedd.diffusion.sampling import Grid, Interval, Sampler


@dataclasses.dataclass(frozen=True)
class TokenSampler(Sampler):
    """A sampler whose state is tokens, Int[B L]."""

    process: Process
    reverses = (Process, "jump processes of tokens")

    def start(self, keys, given):
        return self.process.prior(keys, given.shape[-1])

    def finished(self, x, free):
        return ~jnp.any(self.process.movable(x) & free, axis=-1)


@dataclasses.dataclass(frozen=True)
class Tweedie(TokenSampler, Grid):
    """Tweedie tau-leaping: each token takes its exact posterior step, independently of the others.

    Exact if the tokens are independent, otherwise of first order in the step size. SEDD, equation 19 and theorem 4.2.
    """

    def step(self, keys, denoiser, x, entry):
        sigma = jnp.full(x.shape[0], entry.sigma)
        if self.process.mask_id is None:
            return move(keys, x, self.jump(denoiser(x, sigma, None), x, entry))
        # Which masks are unmasked does not depend on the Denoiser: the head is evaluated at those alone.
        p_move = self.jump(jnp.zeros((*x.shape, 1), sigma.dtype), x, entry).p_move
        position_keys = keyed_random.position_keys(keys, jnp.arange(x.shape[-1]))
        moves = keyed_random.bernoulli(keyed_random.fold(position_keys, 0), p_move)
        return unmask(keys, denoiser, x, sigma, moves, self.head_width(x.shape[-1]))

    def head_width(self, length: int) -> int:
        """Number of positions of a row at which one network call evaluates the head; static under jit.

        At most one step in a million unmasks more of `length` masked tokens.
        """
        with jax.ensure_compile_time_eval():
            mask = jnp.int32(self.process.mask_id)
            p_move = jax.vmap(lambda entry: self.jump(jnp.zeros(1), mask, entry).p_move)(self.plan(None, None))
            p_masked = jnp.cumprod(1 - p_move)  # after each step
            p = float(jnp.max(p_move * jnp.append(1.0, p_masked[:-1])))
        return min(length, 1 + math.ceil(length * p + 5 * math.sqrt(length * p * (1 - p))))

    def jump(self, log_clean: jax.Array, x: jax.Array, entry: Interval) -> Jump:
        """The step of each token over one interval. Float[... V], Int[...] -> Jump of Float[...]."""
        return self.process.tweedie(log_clean, x, entry.sigma, entry.sigma_next)


@dataclasses.dataclass(frozen=True)
class Euler(Tweedie):
    """Euler tau-leaping: the reverse rates are held constant through the step; the last interval is Tweedie's.

    Of first order in the step size. SEDD, equation 17.
    """

    def jump(self, log_clean, x, entry):
        held = leap(self.process.reverse_rate(log_clean, x, entry.sigma), entry.linear)
        last = super().jump(log_clean, x, entry)
        return jax.tree.map(lambda last, held: jnp.where(entry.sigma_next == 0, last, held), last, held)


@dataclasses.dataclass(frozen=True)
class Trapezoidal(Tweedie):
    """The theta-trapezoidal method (Ren et al., arXiv 2502.00234) with theta = 1/2, its stages Tweedie's steps.

    A step moves to the noise halfway in corruption probability, evaluates the Denoiser there, and continues with the
    jump extrapolated from both evaluations: 2 p* - p for each destination, clipped at 0. So the times of unmasking are
    exact, and only the drawn tokens have an error. The last interval is Tweedie's and half as wide as the others, so
    that each network call covers the same time: 2 steps - 1 calls.

    Measured by enumeration, exact Denoiser, three correlated tokens: with each doubling of the steps the distance to
    the distribution falls by 3 at few steps and by 2.1 to 2.3 at 128 calls. That is first order, because of the
    clipping, with a small constant. It is closer than Tweedie at equal calls from 7 on; with 63 calls by 2.1 to 10
    times for Uniform and by 7 to 8 times for Absorbing, 1.3 to 1.4 times for distributions so peaked that most is
    clipped. Held rates, as in the paper, were further off at all of 7 to 128 calls on these distributions, and
    theta = 1/3 was no better.
    """

    def times(self):
        return jnp.append(1 - 2 * jnp.arange(self.steps) / (2 * self.steps - 1), 0.0)

    def step(self, keys, denoiser, x, entry):
        one = functools.partial(super().step, keys, denoiser)
        return jax.lax.cond(entry.sigma_next > 0, functools.partial(self._two_stages, keys, denoiser), one, x, entry)

    def _two_stages(self, keys, denoiser, x, entry):
        first, second = halves(entry)
        before = denoiser(x, jnp.full(x.shape[0], first.sigma), None)
        x = move(keyed_random.fold(keys, 0), x, self.jump(before, x, first))
        after = denoiser(x, jnp.full(x.shape[0], second.sigma), None)
        return move(keyed_random.fold(keys, 1), x, self.second_jump(before, after, x, second))

    def second_jump(self, before: jax.Array, after: jax.Array, x: jax.Array, entry: Interval) -> Jump:
        """The second half of a step. before, after: log_clean at the step's start and at its middle, Float[B L V]."""
        old, new = self.jump(before, x, entry), self.jump(after, x, entry)
        weights = 2 * _p_dest(new) - _p_dest(old)
        return Jump(jnp.clip(2 * new.p_move - old.p_move, 0.0, 1.0), jnp.log(jnp.maximum(weights, 0.0)))

    def calls(self, steps):
        return jnp.where(steps == self.steps, 2 * steps - 1, 2 * steps)


def halves(entry: Interval) -> tuple[Interval, Interval]:
    """Splits an interval at the middle of its corruption probabilities."""
    middle = entry.sigma_next - jnp.log1p(jnp.expm1(entry.sigma_next - entry.sigma) / 2)
    return entry._replace(sigma_next=middle), entry._replace(sigma=middle)


def _p_dest(jump: Jump) -> jax.Array:
    """The probability of a move to each destination. Float[... V]."""
    return jump.p_move[..., None] * jax.nn.softmax(jump.log_dest, axis=-1)


def leap(rate: jax.Array, duration: jax.Array) -> Jump:
    """The jump of constant rates held for a duration, in units of sigma. Float[... V] -> Jump."""
    return Jump(jnp.minimum(duration * jnp.sum(rate, axis=-1), 1.0), jnp.log(rate))


def move(keys: jax.Array, x: jax.Array, jump: Jump, positions: jax.Array | None = None) -> jax.Array:
    """Draws a factorised step, for all samplers. Key[B], Int[B L], Jump of Float[B P] -> Int32[B L].

    positions: Int[B P], the positions of the jumps, None for all L; equal positions of a row draw equal tokens.
    """
    keys = keyed_random.position_keys(keys, jnp.arange(x.shape[-1]) if positions is None else positions)
    here = x if positions is None else jnp.take_along_axis(x, positions, axis=-1)
    moves = keyed_random.bernoulli(keyed_random.fold(keys, 0), jump.p_move)
    there = jnp.where(moves, keyed_random.categorical(keyed_random.fold(keys, 1), jump.log_dest), here)
    return there if positions is None else jnp.put_along_axis(x, positions, there, axis=-1, inplace=False)


def unmask(
    keys: jax.Array, denoiser: Denoiser, x: jax.Array, sigma: jax.Array, where: jax.Array, width: int
) -> jax.Array:
    """Draws tokens, independently of each other, at the masks `where`. Key[B], Int[B L], Bool[B L] -> Int32[B L].

    One network call, with its head at `width` positions of each row. Where a row has more, the loop calls the network
    again with the same x; that is rare, and not counted as a call.
    """
    if width >= x.shape[-1]:
        log_clean = denoiser(x, sigma, None)
        return move(keys, x, Jump(where.astype(log_clean.dtype), log_clean))

    def draw_some(state):
        remaining, drawn, _ = state
        positions = jnp.argsort(~remaining, axis=-1, stable=True)[:, :width]
        chosen = jnp.take_along_axis(remaining, positions, axis=-1)
        log_clean = denoiser(x, sigma, positions)
        drawn = move(keys, drawn, Jump(chosen.astype(log_clean.dtype), log_clean), positions)
        remaining = jnp.put_along_axis(remaining, positions, False, axis=-1, inplace=False)
        return remaining, drawn, jnp.any(remaining)

    return jax.lax.while_loop(lambda state: state[2], draw_some, (where, x, jnp.bool_(True)))[1]
