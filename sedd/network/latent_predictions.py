"""What the outputs of a network of noisy latents mean: the clean token, or the mean of the clean latent."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

DENOISER = "denoiser"  # the outputs are the logits of the token, its own latent included

# The mean E[z0 | z] that the outputs stand for: (output: Float[... D], z: Float[... D], sigma: Float[... 1]) -> Float.
MEANS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "x0": lambda output, z, sigma: output,
    "eps": lambda output, z, sigma: jnp.exp(sigma / 2) * (z - jnp.sqrt(-jnp.expm1(-sigma)) * output),
    "v": lambda output, z, sigma: jnp.exp(-sigma / 2) * z - jnp.sqrt(-jnp.expm1(-sigma)) * output,
}
