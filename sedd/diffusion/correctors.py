"""Correctors: steps at a fixed noise that bring what a sampler has drawn closer to the law p_sigma of that noise.

A grid sampler goes from one noise to the next and errs a little each time; a corrector, run at the noise it has got to,
takes back part of the errors so far (predictor-corrector; Campbell et al., arXiv 2205.14987, section 4.4).

They are also the resampling loops of infilling with the uniform process and a Denoiser that does not know which tokens
are given. Such a Denoiser takes a clean given token among noisy ones for weak evidence, so that clamped sampling stays
off Bayes' conditional however many steps it takes; at little noise the evidence counts in full, and correctors there
make up for what was decided too early. Total variation to the conditional, exact Denoiser, a random law of three
tokens, four patterns of given tokens, Geometric(1e-3, 12), by enumeration:

    Tweedie, 64 or 256 calls           .04 to .16
    64 steps, Gibbs, 1 round           .0002 to .0012      127 calls
    64 steps, Renoise(1), 1 round      .013 to .079        127 calls
    64 steps, Renoise(1), 4 rounds     .004 to .033        316 calls
    64 steps, Renoise(1), 10 rounds    .002 to .016        694 calls
    RePaint, 64 steps, 5 loops         .018 to .10         320 calls

RePaint (Lugmayr et al., arXiv 2201.09865) re-noises the given tokens too, and is worse at equal calls. LogLinear spends
few steps at little noise and leaves more: Gibbs .003 to .016, Renoise(1) in 10 rounds .009 to .058.

Use Gibbs with Geometric noise, steps times rounds times width several times the free positions; on a chain of seven
tokens it took 64 steps and one round from .27 to .03, four rounds to .004. None of them helps where a text is bound so
tightly that at little noise no change of one token is likely: on an almost deterministic chain .5 became .43. A
Denoiser that is told what is given has no such bias (below .01 at 64 steps).
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.process import Process, Uniform
from sedd.diffusion.samplers import Sampler, Tweedie, leap, move
from sedd.diffusion.score import Denoiser

_APART = 4  # free positions from one that Gibbs redraws to the next, at least


@dataclasses.dataclass(frozen=True)
class Corrector(abc.ABC):
    """One round of correction: one network call. Frozen and hashable, as samplers are."""

    def check(self, process: Process) -> None:  # noqa: B027, most correct any process
        """ValueError for a process that it cannot correct."""

    def plan(self, keys: jax.Array, free: jax.Array) -> Any:
        """What one round draws beforehand. Key[B], Bool[B L] -> a pytree."""
        return ()

    @abc.abstractmethod
    def correct(
        self, process: Process, keys: jax.Array, denoiser: Denoiser, x: jax.Array, sigma: jax.Array, entry: Any
    ) -> jax.Array:
        """One round at noise sigma > 0. Key[B], Int[B L], Float[] -> Int[B L]."""


@dataclasses.dataclass(frozen=True)
class Gibbs(Corrector):
    """Redraws a free position of each row, drawn uniformly, from m, its law given the others. Both processes.

    Leaves p_sigma exactly as it is (Zhao et al., arXiv 2407.21243, section 3); the head is run at that position only.
    Six Tweedie steps with one round after each come from a distance of .09 to .0035.

    width: redraws up to so many positions at once, as if they did not depend on each other, evenly spaced from a random
    start and at least four free positions apart; fewer where fewer are free. That is no longer exact: redrawn together,
    two tokens of a random chain drift by .10 to .13 as neighbours (worse than no corrector), .01 to .03 two apart, .001
    to .01 three apart.
    """

    width: int = 1

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"Gibbs: width must be at least 1, not {self.width}")

    def plan(self, keys, free):
        # Rows with less room repeat their positions, which then draw the same.
        count = jnp.maximum(jnp.sum(free, axis=-1, keepdims=True), 1)
        room = jnp.clip(count // _APART, 1, self.width)
        start = jnp.floor(keyed_random.uniform(keys)[:, None] * count.astype(jnp.float32)).astype(jnp.int32)
        slots = (start + jnp.arange(self.width)[None] % room * count // room) % count
        return jnp.take_along_axis(jnp.argsort(~free, axis=-1, stable=True), slots, axis=-1).astype(jnp.int32)

    def correct(self, process, keys, denoiser, x, sigma, entry):
        where = jnp.put_along_axis(jnp.zeros(x.shape, bool), entry, True, axis=-1, inplace=False)
        x = process.mask_tokens(x, where)
        log_clean = denoiser(x, jnp.full(x.shape[0], sigma), entry)
        return move(keys, x, process.redraw(log_clean, sigma), entry)


@dataclasses.dataclass(frozen=True)
class Renoise(Corrector):
    """Perturbs from sigma to (1 + size) sigma, then takes Tweedie's step back. Both processes, all positions at once.

    Where tokens depend on each other p_sigma drifts at second order in the size: at noise .5 by .0011 (Uniform) and
    .0004 (Absorbing) for .1, by a quarter of that for .05. Six Tweedie steps with one round after each come from a
    distance of .09 to .08, .07 and .05 with sizes of .1, .3 and 1; close to the law, large sizes do harm. The forward
    and backward corrector of Campbell et al., arXiv 2205.14987, section 4.4, in two exact halves.
    """

    size: float = 0.3

    def __post_init__(self):
        _positive(self)

    def correct(self, process, keys, denoiser, x, sigma, entry):
        above = (1 + self.size) * sigma
        x = process.perturb(keyed_random.fold(keys, 0), x, self.size * sigma)
        log_clean = denoiser(x, jnp.full(x.shape[0], above), None)
        return move(keyed_random.fold(keys, 1), x, process.tweedie(log_clean, x, above, sigma))


@dataclasses.dataclass(frozen=True)
class Barker(Corrector):
    """Leaps with Barker's rates s / (1 + s) / V, in balance with p_sigma, for size (1 - alpha). Uniform only.

    A token moves with a chance below size (1 - alpha), the share that noise has touched, so that little noise, at
    which few tokens have to move, gets small leaps. Each leap drifts at second order in the size: at noise .5 by .0003
    for .25, by a quarter of that for .125. Six Tweedie steps with one round of size 1 after each come from a distance
    of .09 to .07. Most moves are from a wrong token to another wrong one: with many tokens Gibbs does far more. Zhao et
    al., arXiv 2407.21243, section 3.
    """

    size: float = 0.5

    def __post_init__(self):
        _positive(self)

    def check(self, process):
        if not isinstance(process, Uniform):
            raise ValueError(f"Barker moves tokens into each other: it needs the uniform process, not {process}")

    def correct(self, process, keys, denoiser, x, sigma, entry):
        log_clean = denoiser(x, jnp.full(x.shape[0], sigma), None)
        return move(keys, x, leap(process.barker(log_clean, x, sigma), -self.size * jnp.expm1(-sigma)))


def _positive(corrector: Renoise | Barker) -> None:
    if not corrector.size > 0:
        raise ValueError(f"{type(corrector).__name__}: size must be positive, not {corrector.size}")


@dataclasses.dataclass(frozen=True)
class Corrected(Sampler):
    """A grid sampler with `rounds` rounds of a corrector after each of its steps but the last, which ends at noise 0.

    sampler: Tweedie, Euler or Trapezoidal. Calls: the sampler's, and `rounds` for each step but the last.
    """

    process: Process = dataclasses.field(init=False, repr=False)
    sampler: Tweedie
    corrector: Corrector
    rounds: int = 1

    def __post_init__(self):
        if not isinstance(self.sampler, Tweedie):
            kind = type(self.sampler).__name__
            raise ValueError(f"a corrector needs a sampler that goes down a grid of noises, not {kind}")
        if self.rounds < 1:
            raise ValueError(f"a corrector needs at least one round, not {self.rounds}")
        self.corrector.check(self.sampler.process)
        object.__setattr__(self, "process", self.sampler.process)

    def plan(self, keys, free):
        rounds = jnp.arange(self.sampler.steps * self.rounds).reshape(self.sampler.steps, self.rounds)
        keys_of_rounds = keyed_random.fold(keys, 1)

        def plan(number):
            return self.corrector.plan(keyed_random.fold(keys_of_rounds, number), free)

        return self.sampler.plan(keyed_random.fold(keys, 0), free), jax.vmap(jax.vmap(plan))(rounds)

    def step(self, keys, denoiser, x, entry):
        predicted, corrected = entry
        x = self.sampler.step(keyed_random.fold(keys, 0), denoiser, x, predicted)

        def correct(j, x):
            own = jax.tree.map(lambda leaf: leaf[j], corrected)
            return self.corrector.correct(
                self.process, keyed_random.fold(keys, 1 + j), denoiser, x, predicted.sigma_next, own
            )

        rounds = jnp.where(predicted.sigma_next > 0, self.rounds, 0)
        return jax.lax.fori_loop(0, rounds, correct, x)

    def finished(self, x):
        """None before the end: what a step has settled a corrector can change."""
        return jnp.zeros(x.shape[0], bool)

    def calls(self, steps):
        return self.sampler.calls(steps) + self.rounds * jnp.minimum(steps, self.sampler.steps - 1)
