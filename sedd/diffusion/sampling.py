"""Sampling: what a sampler, a grid and a corrector are, and the one loop that runs them all.

A sampler depends on a Denoiser (or a MeanDenoiser) and its process, never on a network. Its plan is a pytree with a
leading axis of steps, drawn before the first step; each step takes one entry of it, and the state. A state is tokens or
`Latent`: a pytree, so that memory lies in it, in which the loop keeps what is given.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.denoiser import Clean, State, clamped, keep
from sedd.diffusion.schedule import Schedule

_PRIOR, _PLAN, _STEPS = 0, 1, 2  # folded into the rows' keys; step k folds in _STEPS + k


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """A sampler: frozen and hashable, so that it can be a static argument of jit. process: the one it reverses.

    ValueError if the process is not of the type that `reverses` names.
    """

    process: Any
    reverses: ClassVar[tuple[type, str]] = (object, "any process")  # a type of processes, and what they are in words

    def __post_init__(self):
        kind, name = self.reverses
        if not isinstance(self.process, kind):
            raise ValueError(f"{type(self).__name__} is for {name}, not {self.process}")

    @abc.abstractmethod
    def start(self, keys: jax.Array, given: Clean) -> State:
        """A draw of the prior, in the shape of `given`. Key[B] -> State."""

    @abc.abstractmethod
    def plan(self, keys: jax.Array, free: jax.Array) -> Any:
        """All that is decided before the first step. Key[B], Bool[B L] -> a pytree with a leading axis of steps."""

    @abc.abstractmethod
    def step(self, keys: jax.Array, denoiser: Callable[..., jax.Array], x: State, entry: Any) -> State:
        """One step. Key[B], State -> State."""

    def finished(self, x: State, free: jax.Array) -> jax.Array:
        """True for rows that no further step changes: at least those in which nothing is free. -> Bool[B]."""
        return ~jnp.any(free, axis=-1)

    def calls(self, steps: jax.Array) -> jax.Array:
        """Number of network calls in the first `steps` steps."""
        return steps

    def in_blocks(self, size: int) -> "Sampler":
        """The sampler that generates rows as this one does, but block after block of `size` tokens, left to right.

        ValueError if there is none.
        """
        raise ValueError(f"{type(self).__name__} does not generate block after block")


class Interval(NamedTuple):
    """One step of a grid of noise levels. Each Float[], or Float[steps] in the plan."""

    sigma: jax.Array  # noise at the start of the step
    sigma_next: jax.Array  # noise at its end, exactly 0 in the last step
    linear: jax.Array  # Euler's approximation of sigma - sigma_next, rate(t) (t - t_next)


@dataclasses.dataclass(frozen=True)
class Grid(Sampler):
    """A sampler that steps down a grid of noise levels, the same for every row.

    The grid of times from 1 to 0 is even, and its last noise is exactly 0, so that the last interval is the final
    denoising step.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"a sampler needs at least one step, not {self.steps}")

    def times(self) -> jax.Array:
        """The grid, from 1 down to 0. Float[steps + 1]."""
        return jnp.linspace(1.0, 0.0, self.steps + 1)

    def plan(self, keys, free):
        t = self.times()
        sigma = self.schedule.sigma(t).at[-1].set(0.0)
        return Interval(sigma[:-1], sigma[1:], self.schedule.rate(t[:-1]) * (t[:-1] - t[1:]))


@dataclasses.dataclass(frozen=True)
class Corrector(abc.ABC):
    """A move at a fixed noise level, whose round is one network call. Frozen and hashable, as samplers are."""

    def check(self, process: Any) -> None:  # noqa: B027, not abstract: most correctors accept any process
        """ValueError if it cannot correct this process."""

    def plan(self, keys: jax.Array, free: jax.Array) -> Any:
        """All that is drawn before a round. Key[B], Bool[B L] -> a pytree."""
        return ()

    @abc.abstractmethod
    def correct(
        self,
        process: Any,
        keys: jax.Array,
        denoiser: Callable[..., jax.Array],
        x: State,
        sigma: jax.Array,
        entry: Any,
    ) -> State:
        """One round at noise sigma > 0. Key[B], State, Float[] -> State."""


@dataclasses.dataclass(frozen=True)
class Corrected(Sampler):
    """A grid sampler with `rounds` rounds of a corrector after each step but the last, which ends at noise 0.

    A row is not finished before the last step: a corrector can change any token. Network calls: the sampler's, and
    `rounds` for each step but the last.
    """

    process: Any = dataclasses.field(init=False, repr=False)
    sampler: Grid
    corrector: Corrector
    rounds: int = 1

    def __post_init__(self):
        if not isinstance(self.sampler, Grid):
            kind = type(self.sampler).__name__
            raise ValueError(f"a corrector needs a sampler on a grid of noise levels, not {kind}")
        if self.rounds < 1:
            raise ValueError(f"a corrector needs at least one round, not {self.rounds}")
        self.corrector.check(self.sampler.process)
        object.__setattr__(self, "process", self.sampler.process)

    def start(self, keys, given):
        return self.sampler.start(keys, given)

    def plan(self, keys, free):
        rounds = jnp.arange(self.sampler.steps * self.rounds).reshape(self.sampler.steps, self.rounds)
        keys_of_rounds = keyed_random.fold(keys, 1)

        def plan(number):
            return self.corrector.plan(keyed_random.fold(keys_of_rounds, number), free)

        return self.sampler.plan(keyed_random.fold(keys, 0), free), jax.vmap(jax.vmap(plan))(rounds)

    def step(self, keys, denoiser, x, entry):
        interval, corrector_plan = entry
        x = self.sampler.step(keyed_random.fold(keys, 0), denoiser, x, interval)

        def correct(j, x):
            entry = jax.tree.map(lambda leaf: leaf[j], corrector_plan)
            return self.corrector.correct(
                self.process, keyed_random.fold(keys, 1 + j), denoiser, x, interval.sigma_next, entry
            )

        rounds = jnp.where(interval.sigma_next > 0, self.rounds, 0)
        return jax.lax.fori_loop(0, rounds, correct, x)

    def calls(self, steps):
        return self.sampler.calls(steps) + self.rounds * jnp.minimum(steps, self.sampler.steps - 1)


class Task(NamedTuple):
    """Rows to be filled in, and all that is decided before the first step."""

    keys: jax.Array  # Key[B], from the global row
    given: Clean  # read where not free
    free: jax.Array  # Bool[B L]
    plan: Any  # the sampler's plan, a pytree with a leading axis of steps

    @property
    def steps(self) -> int:
        """Maximum number of steps."""
        return jax.tree.leaves(self.plan)[0].shape[0]


class Progress(NamedTuple):
    """How far a task has come, between two steps."""

    steps: jax.Array  # Int32[], number of steps taken
    done: jax.Array  # Bool[], True if no further step changes anything
    x: Any  # the state
    trace: jax.Array | None  # Int32[steps B L], the tokens after each step taken, 0 for the others


def begin(
    key: jax.Array,
    sampler: Sampler,
    given: Clean,
    free: jax.Array,
    rows: jax.Array | None = None,
    trace: bool = False,
) -> tuple[Task, Progress]:
    """Draws the plan and the state before the first step. Arguments as of `sample`."""
    rows = jnp.arange(given.shape[0]) if rows is None else rows
    keys = keyed_random.row_keys(key, rows)
    task = Task(keys, given, free, sampler.plan(keyed_random.fold(keys, _PLAN), free))
    x = keep(sampler.start(keyed_random.fold(keys, _PRIOR), given), given, free)
    states = jnp.zeros((task.steps, *free.shape), jnp.int32) if trace else None
    return task, Progress(jnp.int32(0), _done(sampler, task, jnp.int32(0), x), x, states)


def tokens_themselves(x: Any) -> jax.Array:
    """The tokens that a state shows where tokens diffuse: the state itself. Int[B L] -> Int[B L]."""
    return x


def advance(
    task: Task,
    progress: Progress,
    denoiser: Callable[..., jax.Array],
    sampler: Sampler,
    until: jax.Array | int | None = None,
    shown: Callable[[Any], jax.Array] = tokens_themselves,
) -> Progress:
    """The one loop under every sampler: runs until all rows are finished, or `until` steps are taken in all.

    The given positions are clamped in the Denoiser that the sampler calls, and in the state (SEDD, equation 22).
    shown: as of `sample`, for the trace.
    """
    until = task.steps if until is None else until
    clamped_denoiser = clamped(denoiser, task.given, task.free)

    def unfinished(progress):
        return ~progress.done & (progress.steps < until)

    def body(progress):
        k = progress.steps
        entry = jax.tree.map(lambda leaf: leaf[k], task.plan)
        x = sampler.step(keyed_random.fold(task.keys, _STEPS + k), clamped_denoiser, progress.x, entry)
        x = keep(x, task.given, task.free)
        trace = None if progress.trace is None else progress.trace.at[k].set(shown(x))
        return Progress(k + 1, _done(sampler, task, k + 1, x), x, trace)

    return jax.lax.while_loop(unfinished, body, progress)


def _done(sampler: Sampler, task: Task, steps: jax.Array, x: State) -> jax.Array:
    return (steps >= task.steps) | jnp.all(sampler.finished(x, task.free))


class Sampled(NamedTuple):
    """The result of `sample`."""

    tokens: jax.Array  # Int32[B L], those that the last state shows
    calls: jax.Array  # Int32[], network calls
    trace: jax.Array | None  # Int32[steps B L], the tokens after each step; steps not taken repeat the last


def sample(
    key: jax.Array,
    denoiser: Callable[..., jax.Array],
    sampler: Sampler,
    given: Clean,
    free: jax.Array,
    rows: jax.Array | None = None,
    trace: bool = False,
    shown: Callable[[Any], jax.Array] = tokens_themselves,
) -> Sampled:
    """Samples the free positions given the others: `begin`, then `advance` to the end. Pure; meant to be jitted.

    key: a typed key; denoiser: a Denoiser, or a MeanDenoiser for samplers that take one; given: Int[B L] or
    Float[B L D], clean values, read where not free; free: Bool[B L], any positions, which may differ by row; rows:
    Int[B], the rows' global indices, from which their keys are made (None: 0 .. B - 1); shown: State -> Int[B L], the
    tokens that a state shows, for latents a rounding.
    """
    task, progress = begin(key, sampler, given, free, rows, trace)
    steps, _, x, states = advance(task, progress, denoiser, sampler, shown=shown)
    tokens = shown(x)
    if states is not None:
        states = jnp.where(jnp.arange(task.steps)[:, None, None] < steps, states, tokens[None])
    return Sampled(tokens, sampler.calls(steps), states)
