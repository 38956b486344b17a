"""Correctors of tokens: moves at a fixed noise level that bring samples closer to its distribution p_sigma.

A grid sampler makes a small error in each step; a corrector, run at the noise level that the step has reached, removes
part of the errors so far (predictor-corrector; Campbell et al., arXiv 2205.14987, section 4.4).

Correctors are also the resampling loops of infilling with the uniform process and a Denoiser that is not conditioned on
which tokens are given. Such a Denoiser takes a clean given token among noisy ones for weak evidence, so that clamped
sampling stays off the true conditional however many steps it takes; at low noise the evidence counts in full, and
correctors there revise what was drawn too early. Total variation distance to the conditional, exact Denoiser, a random
distribution of three tokens, four patterns of given tokens, Geometric(1e-3, 12), by enumeration:

    Tweedie, 64 or 256 calls           .04 to .16
    64 steps, Gibbs, 1 round           .0002 to .0012      127 calls
    64 steps, Renoise(1), 1 round      .013 to .079        127 calls
    64 steps, Renoise(1), 4 rounds     .004 to .033        316 calls
    64 steps, Renoise(1), 10 rounds    .002 to .016        694 calls
    RePaint, 64 steps, 5 loops         .018 to .10         320 calls

RePaint (Lugmayr et al., arXiv 2201.09865) re-noises the given tokens too, and is worse at equal calls. LogLinear spends
fewer steps at low noise and leaves more: Gibbs .003 to .016, Renoise(1) in 10 rounds .009 to .058.

Use Gibbs with Geometric noise, and steps times rounds times width several times the number of free positions; on a
chain of seven tokens 64 steps and one round reduced the distance from .27 to .03, four rounds to .004. No corrector
helps where the tokens are so strongly dependent that at low noise no change of a single token is likely: on an almost
deterministic chain .5 became .43. A Denoiser that is conditioned on which tokens are given has no such bias (below .01
at 64 steps).
"""

import dataclasses

import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.discrete.process import Uniform
from sedd.diffusion.discrete.samplers import leap, move
from sedd.diffusion.sampling import Corrector

_MIN_SPACING = 4  # smallest distance, in free positions, of two that Gibbs redraws at once


@dataclasses.dataclass(frozen=True)
class Gibbs(Corrector):
    """Redraws a uniformly random free position of each row from m, its distribution given the others. Both processes.

    Leaves p_sigma exactly invariant (Zhao et al., arXiv 2407.21243, section 3); the head is evaluated at that position
    only. One round after each of six Tweedie steps reduces the distance from .09 to .0035.

    width: the number of positions that are redrawn at once, independently of each other, evenly spaced from a random
    start and at least four free positions apart; fewer if fewer are free. With width > 1 it is not exact: redrawn
    together, two tokens of a random chain drift by .10 to .13 as neighbours (worse than no corrector), .01 to .03 two
    apart, .001 to .01 three apart.
    """

    width: int = 1

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"Gibbs: width must be at least 1, not {self.width}")

    def plan(self, keys, free):
        # Rows with room for fewer repeat positions, which then draw equal tokens.
        count = jnp.maximum(jnp.sum(free, axis=-1, keepdims=True), 1)
        room = jnp.clip(count // _MIN_SPACING, 1, self.width)
        start = jnp.floor(keyed_random.uniform(keys)[:, None] * count.astype(jnp.float32)).astype(jnp.int32)
        slots = (start + jnp.arange(self.width)[None] % room * count // room) % count
        return jnp.take_along_axis(jnp.argsort(~free, axis=-1, stable=True), slots, axis=-1).astype(jnp.int32)

    def correct(self, process, keys, denoiser, x, sigma, entry):
        redrawn = jnp.put_along_axis(jnp.zeros(x.shape, bool), entry, True, axis=-1, inplace=False)
        x = process.mask_tokens(x, redrawn)
        log_clean = denoiser(x, jnp.full(x.shape[0], sigma), entry)
        return move(keys, x, process.gibbs(log_clean, sigma), entry)


@dataclasses.dataclass(frozen=True)
class Renoise(Corrector):
    """Corrupts from sigma to (1 + size) sigma, then takes Tweedie's step back. Both processes, all positions at once.

    Where tokens are dependent p_sigma drifts at second order in the size: at noise .5 by .0011 (Uniform) and .0004
    (Absorbing) for .1, by a quarter of that for .05. One round after each of six Tweedie steps reduces the distance
    from .09 to .08, .07 and .05 with sizes of .1, .3 and 1; close to the distribution, large sizes increase it. It is
    the forward-backward corrector of Campbell et al., arXiv 2205.14987, section 4.4, in two exact halves.
    """

    size: float = 0.3

    def __post_init__(self):
        _positive(self)

    def correct(self, process, keys, denoiser, x, sigma, entry):
        above = (1 + self.size) * sigma
        x = process.corrupt(keyed_random.fold(keys, 0), x, self.size * sigma)
        log_clean = denoiser(x, jnp.full(x.shape[0], above), None)
        return move(keyed_random.fold(keys, 1), x, process.tweedie(log_clean, x, above, sigma))


@dataclasses.dataclass(frozen=True)
class Barker(Corrector):
    """Leaps with Barker's rates s / (1 + s) / V, in detailed balance with p_sigma, for size (1 - alpha). Uniform only.

    A token moves with probability below size (1 - alpha), a fraction of the corruption probability, so that leaps are
    small at low noise, where only a small number of tokens has to move. Each leap drifts at second order in the size:
    at noise .5 by .0003 for .25, by a quarter of that for .125. One round of size 1 after each of six Tweedie steps
    reduces the distance from .09 to .07. Most moves are from a wrong token to another wrong one: with a large
    vocabulary Gibbs is far better. Zhao et al., arXiv 2407.21243, section 3.
    """

    size: float = 0.5

    def __post_init__(self):
        _positive(self)

    def check(self, process):
        if not isinstance(process, Uniform):
            raise ValueError(f"Barker replaces tokens by other tokens: it needs the uniform process, not {process}")

    def correct(self, process, keys, denoiser, x, sigma, entry):
        log_clean = denoiser(x, jnp.full(x.shape[0], sigma), None)
        return move(keys, x, leap(process.barker(log_clean, x, sigma), -self.size * jnp.expm1(-sigma)))


def _positive(corrector: Renoise | Barker) -> None:
    if not corrector.size > 0:
        raise ValueError(f"{type(corrector).__name__}: size must be positive, not {corrector.size}")
