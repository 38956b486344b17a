"""Samplers of Gaussian diffusion: steps down a grid of noise levels, from E[z0 | z] at each.

Each is one small class: the mean and the standard deviation of its step. The last interval of a grid ends at noise 0,
where the answer is E[z0 | z] itself.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

from sedd.diffusion.denoiser import Latent
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.sampling import Grid, Interval


@dataclasses.dataclass(frozen=True)
class GaussianSampler(Grid):
    """A grid sampler of latents by a MeanDenoiser, whose last answer stays in the state (self-conditioning)."""

    process: Gaussian
    reverses = (Gaussian, "Gaussian noise of latents")

    def start(self, keys, given):
        z = self.process.prior(keys, given.shape[-2], given.dtype)
        return Latent(z, jnp.zeros_like(z))

    def step(self, keys, denoiser, x, entry):
        entry = jax.tree.map(lambda leaf: jnp.full((1, 1), leaf, x.z.dtype), entry)
        estimate = denoiser(x, jnp.broadcast_to(entry.sigma[0], x.z.shape[:1]))
        mean, std = self.moments(estimate, x.z, entry)
        return Latent(mean + std * self.process.noise(keys, x.z.shape[-2], x.z.dtype), estimate)

    @abc.abstractmethod
    def moments(self, mean: jax.Array, z: jax.Array, entry: Interval) -> tuple[jax.Array, jax.Array]:
        """The mean and the standard deviation of a step.

        mean: E[z0 | z], Float[B L D]; entry: of Float[1 1]. Returns Float[B L D] and Float[1 1 1].
        """


@dataclasses.dataclass(frozen=True)
class DDIM(GaussianSampler):
    """The posterior step for z0 = E[z0 | z]; eta: 1, ancestral sampling as in DDPM, to 0, DDIM, without noise.

    Of first order in the step size (Song et al., arXiv 2010.02502).
    """

    eta: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")

    def moments(self, mean, z, entry):
        return self.process.posterior(mean, z, entry.sigma, entry.sigma_next, self.eta)


@dataclasses.dataclass(frozen=True)
class Renoised(GaussianSampler):
    """Draws all noise again: z_next from q(z_next | z0 = E[z0 | z]), as Diffusion-LM's paper writes its step.

    It keeps a bias at any number of steps, since E[z0 | z] is no draw of z0 (arXiv 2205.14217, section 4.2).
    """

    def moments(self, mean, z, entry):
        sigma = entry.sigma_next[..., None]
        return jnp.exp(-sigma / 2) * mean, jnp.sqrt(-jnp.expm1(-sigma))


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(GaussianSampler):
    """Euler's steps of the reverse SDE, or without noise those of the probability flow ODE.

    Of first order in rate(t) (t - t_next), which must be small: schedules that end steeply need many steps (Song et
    al., arXiv 2011.13456). max_rate: a limit of rate(t), which bounds the first steps of such a schedule. last: the
    time from which a final step leads to noise 0; 0: the grid itself ends there. TEncDM (arXiv 2402.19097) samples with
    both limits; its code returns the last step of the grid, which is near the mean that is returned here.
    """

    stochastic: bool = True
    max_rate: float = math.inf
    last: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.last < 1 and self.max_rate > 0):
            raise ValueError(f"needs 0 <= last < 1 and max_rate > 0, not {self.last}, {self.max_rate}")

    def times(self):
        if not self.last:
            return super().times()
        return jnp.append(jnp.linspace(1.0, self.last, self.steps), 0.0)

    def plan(self, keys, free):
        t = self.times()
        linear = jnp.minimum(self.schedule.rate(t[:-1]), self.max_rate) * (t[:-1] - t[1:])
        return super().plan(keys, free)._replace(linear=linear)

    def moments(self, mean, z, entry):
        score, weight = self.process.score(mean, z, entry.sigma), 1.0 if self.stochastic else 0.5
        linear, last = entry.linear[..., None], entry.sigma_next[..., None] == 0
        held = z + linear * (z / 2 + weight * score)
        std = jnp.sqrt(linear) if self.stochastic else jnp.zeros_like(linear)
        return jnp.where(last, mean, held), jnp.where(last, 0.0, std)
