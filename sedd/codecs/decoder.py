"""The network that turns latents into tokens, all at once, and the noise that it is trained with."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sedd.diffusion import keyed_random
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.schedule import Schedule
from sedd.network.adapters import padded
from sedd.network.layers import Linear, Norm
from sedd.network.trunk import Trunk

TRANSFORMER, MLP = DECODERS = ("transformer", "mlp")


class Decoder(nn.Module):
    """Maps latents to logits of the tokens (TEncDM, arXiv 2402.19097, section 4.2). Hashable.

    vocab_size: V; width: W; layers, heads: of the transformer; 0 layers: an MLP of two linear maps, which sees each
    latent by itself. dtype: of the transformer's linear maps and attention.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """z: Float[B L D]. Returns Float32[B L V]."""
        h = Linear(self.width, name="in")(z.astype(jnp.float32))
        if self.layers:
            trunk = Trunk(self.width, self.layers, self.heads, dtype=self.dtype, name="trunk")
            h = trunk(h, jnp.ones((z.shape[0], 1), jnp.float32))  # not conditioned: it sees the noise
            h = Norm(name="norm")(h)
        else:
            h = nn.gelu(h, approximate=True)
        return Linear(padded(self.vocab_size), zero=True, split="out", name="out")(h)[..., : self.vocab_size]


ADDED = 0.2  # the standard deviation of the noise of "additive"

# What a decoder is trained on instead of clean latents, by name:
# (process, schedule, keys: Key[B], z0: Float[B L D], t: Float[B]) -> Float[B L D].
CORRUPTIONS: dict[str, Callable[[Gaussian, Schedule, jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "noise": lambda process, schedule, keys, z0, t: process.perturb(keys, z0, schedule.sigma(t)),
    "additive": lambda process, schedule, keys, z0, t: z0 + ADDED * process.noise(keys, z0.shape[1], z0.dtype),
    "none": lambda process, schedule, keys, z0, t: z0,
}


def corruption_times(keys: jax.Array, start: float, end: float) -> jax.Array:
    """A time of the schedule for each row, uniform on [start, end). Key[B] -> Float[B]."""
    return start + (end - start) * keyed_random.uniform(keys)
