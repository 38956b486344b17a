"""Samplers: a plan, a step, and the one loop that runs them all.

A sampler depends on a Denoiser and the process, never on a network. Its plan is a pytree with a leading axis of steps,
drawn before the first step; each step takes one entry of it. Steps are factorised over the positions: a `Jump` for
each token, drawn by `move`.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.process import Absorbing, Jump, Process
from sedd.diffusion.discrete.score import Denoiser, clamped
from sedd.diffusion.schedule import Schedule

_PRIOR, _PLAN, _STEPS = 0, 1, 2  # folded into the rows' keys; step k folds in _STEPS + k


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """A sampler: frozen and hashable, so that it can be a static argument of jit."""

    process: Process

    @abc.abstractmethod
    def plan(self, keys: jax.Array, free: jax.Array) -> Any:
        """All that is decided before the first step. Key[B], Bool[B L] -> a pytree with a leading axis of steps."""

    @abc.abstractmethod
    def step(self, keys: jax.Array, denoiser: Denoiser, x: jax.Array, entry: Any) -> jax.Array:
        """One step. Key[B], Int[B L] -> Int[B L]."""

    def finished(self, x: jax.Array) -> jax.Array:
        """True for rows that no further step changes. Int[B L] -> Bool[B]."""
        return ~jnp.any(self.process.movable(x), axis=-1)

    def calls(self, steps: jax.Array) -> jax.Array:
        """Number of network calls in the first `steps` steps."""
        return steps


class Interval(NamedTuple):
    """One step of a grid of noise levels. Each Float[], or Float[steps] in the plan."""

    sigma: jax.Array  # noise at the start of the step
    sigma_next: jax.Array  # noise at its end, exactly 0 in the last step
    linear: jax.Array  # Euler's approximation of sigma - sigma_next, rate(t) (t - t_next)


@dataclasses.dataclass(frozen=True)
class Tweedie(Sampler):
    """Tweedie tau-leaping: each token takes its exact posterior step, independently of the others.

    The grid of times from 1 to 0 is even, and its last noise is exactly 0, so that the last interval is the final
    denoising step. Exact if the tokens are independent, otherwise of first order in the step size. SEDD, equation 19
    and theorem 4.2.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"a sampler needs at least one step, not {self.steps}")

    def times(self) -> jax.Array:
        """The grid, from 1 down to 0. Float[steps + 1]."""
        return jnp.linspace(1.0, 0.0, self.steps + 1)

    def plan(self, keys, free):
        t = self.times()
        sigma = self.schedule.sigma(t).at[-1].set(0.0)
        return Interval(sigma[:-1], sigma[1:], self.schedule.rate(t[:-1]) * (t[:-1] - t[1:]))

    def step(self, keys, denoiser, x, entry):
        sigma = jnp.full(x.shape[0], entry.sigma)
        if not isinstance(self.process, Absorbing):
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
            mask = jnp.int32(self.process.num_states - 1)
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


class Task(NamedTuple):
    """Rows to be filled in, and all that is decided before the first step."""

    keys: jax.Array  # Key[B], from the global row
    tokens: jax.Array  # Int32[B L], read where not free
    free: jax.Array  # Bool[B L]
    plan: Any  # the sampler's plan, a pytree with a leading axis of steps

    @property
    def steps(self) -> int:
        """Maximum number of steps."""
        return jax.tree.leaves(self.plan)[0].shape[0]


class State(NamedTuple):
    """The state of a task between two steps."""

    steps: jax.Array  # Int32[], number of steps taken
    done: jax.Array  # Bool[], True if no further step changes anything
    tokens: jax.Array  # Int32[B L]
    trace: jax.Array | None  # Int32[steps B L], the tokens after each step taken, 0 for the others


def begin(
    key: jax.Array,
    sampler: Sampler,
    tokens: jax.Array,
    free: jax.Array,
    rows: jax.Array | None = None,
    trace: bool = False,
) -> tuple[Task, State]:
    """Draws the plan and the state before the first step. Arguments as of `sample`."""
    rows = jnp.arange(tokens.shape[0]) if rows is None else rows
    tokens = tokens.astype(jnp.int32)
    keys = keyed_random.row_keys(key, rows)
    task = Task(keys, tokens, free, sampler.plan(keyed_random.fold(keys, _PLAN), free))
    start = jnp.where(free, sampler.process.prior(keyed_random.fold(keys, _PRIOR), tokens.shape[-1]), tokens)
    states = jnp.zeros((task.steps, *tokens.shape), jnp.int32) if trace else None
    return task, State(jnp.int32(0), _done(sampler, task, jnp.int32(0), start), start, states)


def advance(
    task: Task, state: State, denoiser: Denoiser, sampler: Sampler, until: jax.Array | int | None = None
) -> State:
    """The one loop under every sampler: runs until all rows are finished, or `until` steps are taken in all.

    The given tokens are clamped in the Denoiser that the sampler calls, and in the state (SEDD, equation 22).
    """
    until = task.steps if until is None else until
    clamped_denoiser = clamped(denoiser, task.tokens, task.free)

    def unfinished(state):
        return ~state.done & (state.steps < until)

    def body(state):
        k = state.steps
        entry = jax.tree.map(lambda leaf: leaf[k], task.plan)
        x = sampler.step(keyed_random.fold(task.keys, _STEPS + k), clamped_denoiser, state.tokens, entry)
        x = jnp.where(task.free, x, task.tokens)
        states = None if state.trace is None else state.trace.at[k].set(x)
        return State(k + 1, _done(sampler, task, k + 1, x), x, states)

    return jax.lax.while_loop(unfinished, body, state)


def _done(sampler: Sampler, task: Task, steps: jax.Array, x: jax.Array) -> jax.Array:
    x = jnp.where(task.free, x, 0)  # a given position is finished, whatever token it has
    finished = sampler.finished(x) | ~jnp.any(task.free, axis=-1)
    return (steps >= task.steps) | jnp.all(finished)


class Sampled(NamedTuple):
    """The result of `sample`."""

    tokens: jax.Array  # Int32[B L]
    calls: jax.Array  # Int32[], network calls
    trace: jax.Array | None  # Int32[steps B L], the tokens after each step; steps not taken repeat the last


def sample(
    key: jax.Array,
    denoiser: Denoiser,
    sampler: Sampler,
    tokens: jax.Array,
    free: jax.Array,
    rows: jax.Array | None = None,
    trace: bool = False,
) -> Sampled:
    """Samples the free positions given the others: `begin`, then `advance` to the end. Pure; meant to be jitted.

    key: a typed key; tokens: Int[B L], read where not free; free: Bool[B L], any positions, which may differ by row;
    rows: Int[B], the rows' global indices, from which their keys are made (None: 0 .. B - 1).
    """
    task, state = begin(key, sampler, tokens, free, rows, trace)
    steps, _, x, states = advance(task, state, denoiser, sampler)
    if states is not None:
        states = jnp.where(jnp.arange(task.steps)[:, None, None] < steps, states, x[None])
    return Sampled(x, sampler.calls(steps), states)
