"""The Gaussian process over latents, and the closed forms of its reversal.

Each latent is noised independently, with the share alpha = exp(-sigma) of its variance kept:

    q(z | z0) = N(sqrt(alpha) z0, (1 - alpha) I),   signal-to-noise ratio SNR = alpha / (1 - alpha) = 1 / (e^sigma - 1).

All methods are pointwise in the leading axes: latents are Float[... D], and sigma broadcasts to them without the last
axis. Results have the dtype of their arguments. All factors are products and sums of positive numbers in
q = 1 - alpha = -expm1(-sigma) and exp(-sigma), so that they are accurate in float32 at any noise. expm1(sigma) stands
nowhere: XLA on CPU takes it for -expm1(-sigma) where both are in one large sum (tests/test_compiled.py).
"""

import dataclasses

import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Variance-preserving Gaussian noise (Ho et al., arXiv 2006.11239). width: D, the size of a latent."""

    width: int
    mask_id = None  # no latent is without information
    over_latents = True

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"Gaussian: width must be at least 1, not {self.width}")

    def noise(self, keys: jax.Array, length: int, dtype=jnp.float32) -> jax.Array:
        """Standard normal numbers, keyed by row and position. Key[B] -> Float[B length D]."""
        return keyed_random.normal(keyed_random.position_keys(keys, jnp.arange(length)), self.width, dtype)

    def prior(self, keys: jax.Array, length: int, dtype=jnp.float32) -> jax.Array:
        """Draws latents from N(0, I). Key[B] -> Float[B length D]."""
        return self.noise(keys, length, dtype)

    def perturb(self, keys: jax.Array, z0: jax.Array, sigma: jax.Array) -> jax.Array:
        """Draws z from q(z | z0) at noise sigma. Key[B], Float[B L D], Float[B] -> Float[B L D]."""
        sigma = sigma[:, None, None]
        return jnp.exp(-sigma / 2) * z0 + jnp.sqrt(_q(sigma)) * self.noise(keys, z0.shape[-2], z0.dtype)

    def posterior(
        self, mean: jax.Array, z: jax.Array, sigma: jax.Array, sigma_next: jax.Array, eta: float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """The mean and the standard deviation of a step from sigma > 0 down to sigma_next, if z0 is `mean`.

        eta: 1, the posterior q(z_next | z, z0) of the noise process, as in DDPM; 0, the deterministic step of DDIM;
        between them any other (Song et al., arXiv 2010.02502, equation 12). At sigma_next 0 it ends at `mean`.
        Float[... D] twice, Float[...] twice -> Float[... D], Float[... 1].
        """
        sigma, sigma_next = sigma[..., None], sigma_next[..., None]
        q, q_next, added = _q(sigma), _q(sigma_next), _q(sigma - sigma_next)
        kept = jnp.exp(sigma_next - sigma) * q_next / q
        along = q_next * ((1 - eta) * (1 + eta) + eta**2 * kept)
        direction = (z - jnp.exp(-sigma / 2) * mean) * jax.lax.rsqrt(q)
        std = eta * jnp.sqrt(q_next * added / q)
        return jnp.exp(-sigma_next / 2) * mean + jnp.sqrt(along) * direction, std

    def score(self, mean: jax.Array, z: jax.Array, sigma: jax.Array) -> jax.Array:
        """grad_z log p(z) = (sqrt(alpha) E[z0 | z] - z) / (1 - alpha), where `mean` is E[z0 | z]. Float[... D]."""
        sigma = sigma[..., None]
        return (jnp.exp(-sigma / 2) * mean - z) / _q(sigma)

    def squared_error(self, error: jax.Array, sigma: jax.Array) -> jax.Array:
        """The integrand of the bound, nats per unit sigma: |z0 - E[z0 | z]|^2 SNR / (2 (1 - alpha)). Float[...].

        error: |z0 - E[z0 | z]|^2. Times `schedule.rate(t)` it is -SNR'(t) / 2 times the error (Kingma et al.,
        arXiv 2107.00630, equation 17).
        """
        return error * jnp.exp(-sigma) / (2 * _q(sigma) ** 2)

    def step_divergence(self, error: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        """KL of the posterior steps from z0 and from E[z0 | z], sigma down to sigma_next > 0. nats, Float[...].

        (SNR(sigma_next) - SNR(sigma)) / 2 times the error: a term of the bound of T steps (arXiv 2107.00630, equation
        14).
        """
        return error * jnp.exp(-sigma_next) * _q(sigma - sigma_next) / (2 * _q(sigma_next) * _q(sigma))

    def prior_divergence(self, z0: jax.Array, sigma: jax.Array | float) -> jax.Array:
        """KL(q(z | z0) || N(0, I)) at noise sigma, nats a latent. Float[... D] -> Float[...]."""
        alpha = jnp.exp(-jnp.asarray(sigma, z0.dtype))
        return (alpha * jnp.sum(z0**2, axis=-1) - self.width * (alpha + jnp.log1p(-alpha))) / 2

    def log_evidence(self, z: jax.Array, table: jax.Array, sigma: jax.Array) -> jax.Array:
        """log q(z | z0 = table[v]) up to a constant in v, at noise sigma > 0. Float[... D], Float[V D] -> Float[... V].

        The evidence of a position's own latent for its token.
        """
        sigma = sigma[..., None]
        squares = jnp.reshape(jnp.sum(table**2, axis=-1), (*[1] * (z.ndim - 1), -1))
        return (jnp.exp(-sigma / 2) * (z @ table.T) - jnp.exp(-sigma) * squares / 2) / _q(sigma)


def _q(sigma: jax.Array) -> jax.Array:
    """1 - alpha."""
    return -jnp.expm1(-sigma)
