"""What changes a MeanDenoiser: rounding to embeddings, and guidance by a classifier or by a conditional network.

Each returns a MeanDenoiser made from a MeanDenoiser, which any sampler takes; Diffusion-LM's published control is a
corrector.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sedd.diffusion.denoiser import MeanDenoiser
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.sampling import Corrector


def nearest(z: jax.Array, table: jax.Array) -> jax.Array:
    """The token whose embedding is the nearest to each latent. Float[... D], Float[V D] -> Int32[...]."""
    squares = jnp.reshape(jnp.sum(table**2, axis=-1), (*[1] * (z.ndim - 1), -1))
    return jnp.argmax(z @ table.T - squares / 2, axis=-1).astype(jnp.int32)


def rounded(mean_denoiser: MeanDenoiser, table: jax.Array, below: float = math.inf) -> MeanDenoiser:
    """Replaces E[z0 | z] by the nearest embedding where sigma <= below: Diffusion-LM's clamping trick.

    It biases the samples like a low temperature, except where the token is decided anyway; at all noise levels by
    default, as published (arXiv 2205.14217, section 4.2). table: Float[V D].
    """

    def inner(x, sigma):
        mean = mean_denoiser(x, sigma)
        return jnp.where(sigma[:, None, None] <= below, table[nearest(mean, table)], mean)

    return inner


def guided(
    mean_denoiser: MeanDenoiser, log_likelihood: Callable[[jax.Array, jax.Array], jax.Array], scale: float = 1.0
) -> MeanDenoiser:
    """E[z0 | z, c] by Bayes' rule: E[z0 | z] + scale (1 - alpha) / sqrt(alpha) grad_z log p(c | z).

    Exact for scale 1 and the exact log_likelihood(z: Float[B L D], sigma: Float[B]) -> log p(c | z): Float[B]
    (Dhariwal and Nichol, arXiv 2105.05233, section 4). Needs sigma <= 40 in float32.
    """

    def inner(x, sigma):
        gradient = jax.grad(lambda z: jnp.sum(log_likelihood(z, sigma)))(x.z)
        factor = -scale * jnp.exp(sigma / 2) * jnp.expm1(-sigma)
        return mean_denoiser(x, sigma) + factor[:, None, None] * gradient

    return inner


def classifier_free(conditional: MeanDenoiser, unconditional: MeanDenoiser, weight: float) -> MeanDenoiser:
    """unconditional + weight (conditional - unconditional); 1 is the conditional alone.

    Ho and Salimans, arXiv 2207.12598.
    """

    def inner(x, sigma):
        without = unconditional(x, sigma)
        return without + weight * (conditional(x, sigma) - without)

    return inner


@dataclasses.dataclass(frozen=True)
class GradientSteps(Corrector):
    """Diffusion-LM's control: after each step, `steps` steps that raise log p(c | z) (arXiv 2205.14217, section 5.1).

    Each coordinate moves by `rate` along the sign of the gradient, since the published code begins a new Adagrad for
    every update. `fluency` weighs the squared distance from the drawn latent. The steps do not shrink with the noise,
    so that samples are of the class but not distributed as given the class; `guided` has that distribution.
    log_likelihood: (z: Float[B L D], sigma: Float[B]) -> Float[B].
    """

    log_likelihood: Callable[[jax.Array, jax.Array], jax.Array]
    rate: float = 0.1
    fluency: float = 0.01
    steps: int = 3

    def check(self, process):
        if not isinstance(process, Gaussian):
            raise ValueError(f"GradientSteps moves latents: it needs Gaussian noise, not {process}")

    def correct(self, process, keys, denoiser, x, sigma, entry):
        noise = jnp.full(x.z.shape[0], sigma, x.z.dtype)
        scale = self.fluency * jax.lax.rsqrt(-jnp.expm1(-sigma))

        def objective(z):
            return jnp.sum(self.log_likelihood(z, noise)) - scale * jnp.sum((z - x.z) ** 2)

        def move(_, z):
            return z + self.rate * jnp.sign(jax.grad(objective)(z))

        return x._replace(z=jax.lax.fori_loop(0, self.steps, move, x.z))
