"""Samplers: a plan, a step, and the one loop that runs them all.

A sampler sees a Denoiser and the process, never a network. Its plan is a pytree with a leading axis of steps, drawn
beforehand; its step takes one entry of the plan. Steps are factorised over the positions: each is a `Jump` for each
token, drawn by `move`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import draws
from sedd.diffusion.process import Jump, Process
from sedd.diffusion.schedule import Schedule
from sedd.diffusion.score import Denoiser, clamped

_PRIOR, _PLAN, _STEPS = 0, 1, 2  # what the rows' keys are folded with; step k takes _STEPS + k


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Frozen and hashable, so that it can be a static argument of jit."""

    process: Process

    def plan(self, keys: jax.Array, free: jax.Array) -> Any:
        """What can be settled before the first step. Key[B], Bool[B L] -> a pytree with a leading axis of steps."""
        raise NotImplementedError

    def step(self, keys: jax.Array, denoiser: Denoiser, x: jax.Array, entry: Any) -> jax.Array:
        """One step. Key[B], Int[B L] -> Int[B L]."""
        raise NotImplementedError

    def finished(self, x: jax.Array) -> jax.Array:
        """The rows that no step will change any more. Int[B L] -> Bool[B]."""
        return ~jnp.any(self.process.movable(x), axis=-1)

    def calls(self, steps: jax.Array) -> jax.Array:
        """How many times the network was called in so many steps."""
        return steps


class Interval(NamedTuple):
    """One step of a grid of noise levels. Each Float[], or Float[steps] in the plan."""

    sigma: jax.Array  # the noise from which the step starts
    sigma_next: jax.Array  # the noise to which it goes, exactly 0 in the last
    linear: jax.Array  # the step's noise as an Euler step has it, rate(t) (t - t_next)


@dataclasses.dataclass(frozen=True)
class Tweedie(Sampler):
    """Tweedie tau-leaping: each token takes the exact step of its posterior, as if the others stood still.

    An even grid of times from 1 to 0 whose last noise is exactly 0, so that the last interval is the final denoising
    step. Exact where the tokens are independent, else of first order in the step. SEDD, equation 19 and theorem 4.2.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"a sampler needs at least one step, not {self.steps}")

    def plan(self, keys, free):
        t = jnp.linspace(1.0, 0.0, self.steps + 1)
        sigma = self.schedule.sigma(t).at[-1].set(0.0)
        return Interval(sigma[:-1], sigma[1:], self.schedule.rate(t[:-1]) * (t[:-1] - t[1:]))

    def step(self, keys, denoiser, x, entry):
        log_clean = denoiser(x, jnp.full(x.shape[0], entry.sigma), None)
        return move(keys, x, self.jump(log_clean, x, entry))

    def jump(self, log_clean: jax.Array, x: jax.Array, entry: Interval) -> Jump:
        """The step of each token over one interval."""
        return self.process.tweedie(log_clean, x, entry.sigma, entry.sigma_next)


@dataclasses.dataclass(frozen=True)
class Euler(Tweedie):
    """Euler tau-leaping: the reverse rates held through the step, the last interval Tweedie's.

    Of first order in the step. SEDD, equation 17.
    """

    def jump(self, log_clean, x, entry):
        held = leap(self.process.rate(log_clean, x, entry.sigma), entry.linear)
        last = super().jump(log_clean, x, entry)
        return jax.tree.map(lambda last, held: jnp.where(entry.sigma_next == 0, last, held), last, held)


def leap(rate: jax.Array, duration: jax.Array) -> Jump:
    """The jump with rates held for a duration, in units of sigma. Float[... V] -> Jump."""
    return Jump(jnp.minimum(duration * jnp.sum(rate, axis=-1), 1.0), jnp.log(rate))


def move(keys: jax.Array, x: jax.Array, jump: Jump) -> jax.Array:
    """The one draw of all factorised steps. Key[B], Int[B L], Jump -> Int32[B L]."""
    sites = draws.sites(keys, jnp.arange(x.shape[-1]))
    moves = draws.bernoulli(draws.fold(sites, 0), jump.p_move)
    return jnp.where(moves, draws.categorical(draws.fold(sites, 1), jump.log_dest), x)


class Sampled(NamedTuple):
    """What the loop returns."""

    tokens: jax.Array  # Int32[B L]
    calls: jax.Array  # Int32[], network calls
    trace: jax.Array | None  # Int32[steps B L], the state after each step; steps not taken repeat the last


def sample(
    key: jax.Array,
    denoiser: Denoiser,
    sampler: Sampler,
    tokens: jax.Array,
    free: jax.Array,
    rows: jax.Array | None = None,
    trace: bool = False,
) -> Sampled:
    """Draws the free positions given the others: the one loop under every sampler. Pure; meant to be jitted.

    The given tokens are clamped in the function that the sampler calls, and in the state (SEDD, equation 22). The loop
    ends with the plan, or when every row is finished.

    key: a typed key; tokens: Int[B L], read where not free; free: Bool[B L], any positions, different ones in each row;
    rows: Int[B], the rows' global indices, which key their noise (0 .. B - 1 when None).
    """
    rows = jnp.arange(tokens.shape[0]) if rows is None else rows
    tokens = tokens.astype(jnp.int32)
    keys = draws.row_keys(key, rows)
    seen = clamped(denoiser, tokens, free)
    plan = sampler.plan(draws.fold(keys, _PLAN), free)
    steps = jax.tree.leaves(plan)[0].shape[0]

    def going(state):
        k, x, _ = state
        settled = jnp.where(free, x, 0)  # a given position is settled, whatever it holds
        return (k < steps) & ~jnp.all(sampler.finished(settled))

    def body(state):
        k, x, states = state
        entry = jax.tree.map(lambda leaf: leaf[k], plan)
        x = jnp.where(free, sampler.step(draws.fold(keys, _STEPS + k), seen, x, entry), tokens)
        states = states.at[k].set(x) if trace else None
        return k + 1, x, states

    start = jnp.where(free, sampler.process.prior(draws.fold(keys, _PRIOR), tokens.shape[-1]), tokens)
    states = jnp.zeros((steps, *tokens.shape), jnp.int32) if trace else None
    k, x, states = jax.lax.while_loop(going, body, (jnp.int32(0), start, states))
    if trace:
        states = jnp.where(jnp.arange(steps)[:, None, None] < k, states, x)
    return Sampled(x, sampler.calls(k), states)
